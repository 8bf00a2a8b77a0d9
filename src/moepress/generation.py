"""Which of a model's own generation settings our commands follow.

generation_config.json can ask for anything that transformers' `generate` does: beams, a time limit,
another form of result, stop strings, which need a tokenizer. transformers puts these settings in
place of every one that a call leaves open. Text that the model writes for calibration, evaluation
and `generate` must not depend on them, and a chat cannot follow all of them. So each command names
the settings that it follows, and all others are those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field

from moepress.reading.documents import OpenDocument, parse

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
STOPS = (*ENDS, "stop_strings")  # where a text ends; stop strings need the tokenizer
NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip
TOKENS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
CHAT = (*STOPS, *NUMBERS, *TOKENS, "do_sample")
# They do not change the text: how it is computed, and how much of it, which our commands say.
HARMLESS = (
    "max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "compile_config", "disable_compile", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "transformers_version", "_from_model_config",
)  # fmt: skip


Token = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]  # negative ones: "none", in old files
Tokens = Annotated[list[Token], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Settings(OpenDocument):
    """The settings that commands follow, with the types and ranges that transformers needs."""

    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None
    stop_strings: str | list[str] | None = None
    do_sample: bool | int | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_h: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    bad_words_ids: Annotated[list[Tokens], Field(min_length=1)] | None = None
    suppress_tokens: list[Token] | None = None
    begin_suppress_tokens: list[Token] | None = None


@contextmanager
def following(model: Any, names: Sequence[str] = ENDS) -> Iterator[None]:
    """Inside the `with` statement, a model has only these of its own generation settings.

    Args:
        model: of transformers, loaded.
        names: fields of its generation config.

    Raises:
        FileError: one of them is of a wrong type or out of range.
    """
    before = model.generation_config
    model.generation_config = type(before)(**checked_settings(before, names))
    try:
        yield
    finally:
        model.generation_config = before


def context_of(config: Any) -> int | None:
    """Tokens of the longest text that a model reads, with what it writes.

    Args:
        config: of the language model.

    Returns:
        The number; None: the config names none.
    """
    reads = getattr(config, "max_position_embeddings", None)
    return reads if isinstance(reads, int) and reads > 0 else None


def chat_settings(model: Any) -> tuple[str, ...]:
    """The settings that a chat follows.

    Without a temperature above 0 the model answers greedily.

    Raises:
        FileError: a setting is of a wrong type or out of range.
    """
    greedy = checked_settings(model.generation_config, CHAT).get("temperature") == 0
    return tuple(n for n in CHAT if not (greedy and n in ("do_sample", "temperature")))


def left_aside(model: Any, followed: Sequence[str]) -> str:
    """The model's own settings that would change its text and are not followed, in words."""
    config = model.generation_config
    own = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    return ", ".join(
        f"{name} = {value}"
        for name, value in sorted(own.items())
        if value is not None and name not in (*followed, *HARMLESS)
    )


def checked_settings(config: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those of some fields of a generation config that are set.

    Raises:
        FileError: one is of a wrong type or out of range.
    """
    found = {name: getattr(config, name, None) for name in names}
    given = {name: value for name, value in found.items() if value is not None}
    parse(_Settings, given, "The model's generation_config.json", "Correct or remove that file.")
    return given
