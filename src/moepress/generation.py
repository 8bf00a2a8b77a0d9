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
from typing import Any

from moepress.errors import InputError

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


@contextmanager
def following(model: Any, names: Sequence[str] = ENDS) -> Iterator[None]:
    """Inside the `with` statement, a model has only these of its own generation settings.

    Args:
        model: of transformers, loaded.
        names: fields of its generation config.
    """
    before = model.generation_config
    model.generation_config = type(before)(**_set(before, names))
    try:
        yield
    finally:
        model.generation_config = before


def chat_settings(model: Any) -> tuple[str, ...]:
    """The settings that a chat follows.

    Without a temperature above 0 the model answers greedily.

    Raises:
        InputError: a setting is of a wrong type.
    """
    config = model.generation_config
    for name, value in _set(config, (*NUMBERS, "do_sample")).items():
        if not isinstance(value, int | float):
            raise InputError(
                f"The model's generation_config.json says {name} = {value!r}. Expected a number: "
                "correct that file, or give --temperature."
            )
    greedy = config.temperature is not None and not config.temperature > 0
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


def _set(config: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those of some fields that are set."""
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}
