"""Text piece by piece, and the choice of tokens, each against a plain computation."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from moepress.errors import FileError
from moepress.pieces import MOST_WAITING, UNKNOWN, Pieces
from moepress.serve.asking import understood
from moepress.serve.sampling import Sampler, Settings, described
from moepress.serve.schema import Completion
from moepress.serve.writing import Writer
from tests.serve.conftest import Here  # skips without the server's libraries


class Letters:
    """A tokenizer of letters that is written in Python."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_sequence(text: str, stop: list[str]) -> None:
    writer = Writer(Letters(), stop)
    pieces = []
    for letter in text:
        pieces.append(writer.add(ord(letter)))
        if writer.stopped:
            break
    pieces.append(writer.end())
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    expected = text
    if ends:  # the earliest end of one; of those that end there, the one that begins first
        seen = text[: ends[0]]
        expected = seen[: min(seen.find(one) for one in stop if one in seen)]
    assert "".join(pieces) == expected
    assert writer.stopped == bool(ends)


def test_incomplete_characters_wait(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer("héé → x", add_special_tokens=False).input_ids
    writer = Writer(tokenizer)
    pieces = [writer.add(token) for token in ids]
    assert "".join(pieces) + writer.end() == "héé → x" and "\ufffd" not in "".join(pieces)
    cut = Writer(tokenizer)
    first = [cut.add(token) for token in tokenizer("é", add_special_tokens=False).input_ids[:1]]
    assert first == [""] and cut.end() == "\ufffd"


def test_long_stop_sequences_cost_little() -> None:
    """They are searched for between all tokens of all answers."""
    stop = ["x" * at + "y" + "z" * (999 - at) for at in range(16)]
    writer = Writer(Letters(), stop)
    began = time.thread_time()
    text = "".join(writer.add(ord("x")) for _ in range(1000))
    assert time.thread_time() - began < 0.5  # of 2 s if all that they begin with is compared
    assert text + writer.end() == "x" * 1000


class Silent:
    """A tokenizer whose tokens are no characters. It counts how many it decodes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.decoded = 0

    def decode(self, ids: list[int], **_: object) -> str:
        self.decoded += len(ids)
        return "".join("x" if token == 1 else self.text for token in ids)


@pytest.mark.parametrize("text", ["", UNKNOWN])
def test_tokens_without_characters_cost_little(text: str) -> None:
    """A model may write thousands of special tokens, or of bytes that are no character."""
    tokenizer = Silent(text)
    pieces = Pieces(tokenizer)
    tokens = [1, *[0] * 1000, 1]
    assert "".join(map(pieces.add, tokens)) + pieces.end() == "x" + text * 1000 + "x"
    assert tokenizer.decoded < 4 * MOST_WAITING * len(tokens)


def test_defaults_of_the_folder() -> None:
    greedy = GenerationConfig(temperature=0.7, do_sample=False)
    assert Settings.of_folder(greedy).temperature == 0
    sampling = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=5)
    settings = Settings.of_folder(sampling)
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.7, 0.9, 5)
    assert Settings.of_folder(GenerationConfig(do_sample=True)).temperature == 1.0
    sampling.temperature = "warm"  # type: ignore[assignment]
    with pytest.raises(FileError, match=r"temperature = 'warm'"):  # as a chat has it
        Settings.of_folder(sampling)


@pytest.mark.parametrize("nothing", ["temperature", "top_p"])
def test_zero_is_the_most_probable_token(nothing: str) -> None:
    settings = Settings.of_folder(GenerationConfig(do_sample=True, **{nothing: 0}))
    logits = torch.tensor([1.0, 0.9, 1.1, 1.0])
    assert {Sampler(settings, [0]).choose(logits).token for _ in range(50)} == {2}


@pytest.mark.parametrize(
    "own, stop", [("end", ("end",)), (["a", "", "b"], ("a", "b")), (None, ()), ("", ())]
)
def test_stop_strings_of_the_folder(here: Here, own: Any, stop: tuple[str, ...]) -> None:
    settings = Settings.of_folder(GenerationConfig(stop_strings=own))
    assert settings.stop == stop
    served = replace(here.served, defaults=settings)
    body = b'{"prompt": "x", "stop": "mine"}'
    assert understood(served, Completion, body).wanted.stop == ("mine", *stop)


def test_stop_strings_that_are_special_tokens_end_answers(tokenizer_folder: Path) -> None:
    """The text has none of them: what looks for strings in it would not see them."""
    from moepress.serve.model import ends_of

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = GenerationConfig(eos_token_id=[7, 8], stop_strings=["<s>", "def"])
    model = SimpleNamespace(generation_config=config)
    assert ends_of(model, tokenizer) == [7, 8, tokenizer.bos_token_id]
    model.generation_config = GenerationConfig()
    assert ends_of(model, tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probabilities_say(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    sampler = Sampler(Settings(temperature=temperature, top_p=0.95, seed=1), [])
    counts = torch.bincount(
        torch.tensor([sampler.choose(logits).token for _ in range(4000)]), minlength=4
    )
    expected = (logits / temperature).softmax(-1)
    order = expected.argsort(descending=True)
    kept = order[expected[order].cumsum(0) - expected[order] < 0.95]
    share = torch.zeros(4).index_put((kept,), expected[kept] / expected[kept].sum())
    torch.testing.assert_close(counts / 4000, share, atol=0.03, rtol=0)
    assert counts[share == 0].sum() == 0


def test_the_most_probable_tokens_take_little_memory() -> None:
    """Answers keep them for all their tokens until they are sent."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    tracemalloc.start()
    choices = [described(logits, 5, 20) for _ in range(200)]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / len(choices) < 20 * 40  # as tuples, 100 each
    values, tokens = logits.log_softmax(-1).topk(20)
    assert list(choices[0].top) == list(zip(tokens.tolist(), values.tolist(), strict=True))
    assert choices[0].logprob == float(logits.log_softmax(-1)[5])


def test_penalties_count_what_was_generated() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    frequent = Sampler(Settings(frequency_penalty=0.08), [0, 0])
    assert [frequent.choose(logits).token for _ in range(4)] == [0, 0, 1, 0]
    present = Sampler(Settings(presence_penalty=0.5), [])
    assert [present.choose(logits).token for _ in range(3)] == [0, 1, 0]
    repeated = Sampler(Settings(repetition_penalty=2.0), [0])  # counts the prompt, as in `generate`
    assert repeated.choose(logits).token == 1
    assert repeated.choose(logits).token == 0  # both count now
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.0])
