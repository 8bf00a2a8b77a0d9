"""Sequences are whole, contiguous pieces of the text, drawn by seed and divided by weight."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import InputError
from moepress.text import stream, windows
from moepress.text.beginning import beginning
from moepress.text.windows import (
    Tokens,
    check_vocab,
    divide,
    evaluation_tokens,
    load_tokens,
    parse_text,
)
from tests.text.conftest import LINES, Characters, Counting, begins, encode


def places(drawn: torch.Tensor, whole: list[int]) -> list[int]:
    """Where each window begins in a stream of tokens; every window must be in it."""
    length = drawn.shape[1]
    starts = {tuple(whole[i : i + length]): i for i in range(len(whole) - length + 1)}
    return [starts[tuple(window.tolist())] for window in drawn]


# Texts and their weights.


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("wiki.txt", ("wiki.txt", 1.0)),
        ("wiki.txt=2", ("wiki.txt", 2.0)),
        ("wiki.txt=.5", ("wiki.txt", 0.5)),
        ("wiki.txt=1e-3", ("wiki.txt", 0.001)),
        ("a=b/c.txt", ("a=b/c.txt", 1.0)),
        ("a=b.txt=3", ("a=b.txt", 3.0)),
        ("run=3=1", ("run=3", 1.0)),
        ("wiki=", ("wiki=", 1.0)),
        ("wiki=nan", ("wiki=nan", 1.0)),
        ("v1.5", ("v1.5", 1.0)),
    ],
)
def test_parse_text(spelled: str, expected: tuple[str, float]) -> None:
    assert parse_text(spelled) == expected


@pytest.mark.parametrize("spelled", ["", "=2", "wiki=0", "wiki=-1", "wiki=1e999"])
def test_parse_text_refuses(spelled: str) -> None:
    with pytest.raises(InputError, match="expected PATH or PATH=WEIGHT"):
        parse_text(spelled)


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=8).flatmap(
        lambda weights: st.tuples(st.just(weights), st.integers(len(weights), 500))
    )
)
def test_divide_gives_every_text_its_share(case: tuple[list[float], int]) -> None:
    weights, total = case
    shares = divide(total, weights)
    quotas = [total * weight / sum(weights) for weight in weights]
    assert sum(shares) == total
    assert min(shares) >= 1
    if min(quotas) >= 1:  # then it is the plain largest remainder
        assert all(abs(s - q) < 1 + 1e-9 for s, q in zip(shares, quotas, strict=True))
        remainders = sorted((q - math.floor(q) for q in quotas), reverse=True)
        given_up = [q - math.floor(q) for s, q in zip(shares, quotas, strict=True) if s > q]
        assert all(r >= remainders[len(given_up) - 1] - 1e-9 for r in given_up)


def test_divide_examples() -> None:
    assert divide(10, [1, 1, 1]) == [4, 3, 3]
    assert divide(4, [1000, 1, 1]) == [2, 1, 1]
    with pytest.raises(InputError, match="3 texts share 2 sequences"):
        divide(2, [1, 1, 1])


def test_check_vocab() -> None:
    tokens = Tokens(torch.tensor([[1, 2], [3, 9]]), ("a", "b"))
    check_vocab(tokens, 10)
    with pytest.raises(InputError, match="Text b gives token 9, but the model knows 9"):
        check_vocab(tokens, 9)


# Calibration.


def test_windows_are_contiguous_and_do_not_overlap(tokenizer: Any, text: Path) -> None:
    tokens = load_tokens([(str(text), 1.0)], tokenizer, 7, 33, seed=0)
    assert tokens.ids.shape == (7, 33)
    assert tokens.ids.dtype == torch.int64
    assert tokens.texts == (str(text),) * 7
    # A chunk has 528 bytes here: windows come from a sample of chunks, with EOS between them.
    decoded = [tokenizer.decode(row) for row in tokens.ids]
    assert len(set(decoded)) == 7
    for piece in "</s>".join(decoded).split("</s>"):
        assert piece.strip("\ufffd") in LINES  # a window may begin or end inside an é


def test_windows_of_a_small_text_lie_in_its_token_stream(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text(LINES[:1500])
    stream = encode(tokenizer, LINES[:1500])
    length = 100  # a chunk is larger than the file
    at = places(load_tokens([(str(path), 1.0)], tokenizer, 4, length, seed=3).ids, stream)
    assert all(b - a >= length for a, b in pairwise(at))
    assert at != places(load_tokens([(str(path), 1.0)], tokenizer, 4, length, seed=4).ids, stream)


def test_a_text_that_just_fits_is_used_whole(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text(LINES[:2000])
    stream = encode(tokenizer, LINES[:2000])
    length = len(stream) // 3
    tokens = load_tokens([(str(path), 1.0)], tokenizer, 3, length, seed=0)
    slack = len(stream) - 3 * length
    assert all(0 <= at - i * length <= slack for i, at in enumerate(places(tokens.ids, stream)))
    with pytest.raises(InputError, match=rf"has {len(stream):,} tokens; 4 sequences of {length}"):
        load_tokens([(str(path), 1.0)], tokenizer, 4, length, seed=0)


def test_the_seed_decides_and_other_texts_do_not(tokenizer: Any, tmp_path: Path) -> None:
    a, b = (tmp_path / name for name in ("a.txt", "b.txt"))
    a.write_text(LINES)
    b.write_text(LINES.upper())
    both = load_tokens([(str(a), 1.0), (str(b), 1.0)], tokenizer, 6, 40, seed=1)
    turned = load_tokens([(str(b), 1.0), (str(a), 1.0)], tokenizer, 6, 40, seed=1)
    alone = load_tokens([(str(a), 1.0)], tokenizer, 3, 40, seed=1)
    assert both.texts == (str(a),) * 3 + (str(b),) * 3
    assert torch.equal(both.ids, turned.ids.roll(3, 0))
    assert torch.equal(both.ids[:3], alone.ids)
    other = load_tokens([(str(a), 1.0)], tokenizer, 3, 40, seed=2)
    assert not torch.equal(alone.ids, other.ids)


def test_weights_divide_the_sequences(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(LINES)
    texts = [(str(tmp_path / "a"), 3.0), (str(tmp_path / "b"), 1.0)]
    assert load_tokens(texts, tokenizer, 8, 20, 0).texts == tuple(
        str(tmp_path / name) for name in "aaaaaabb"
    )


def test_the_same_file_elsewhere_gives_the_same_sequences(tokenizer: Any, tmp_path: Path) -> None:
    paths = [tmp_path / folder / "numbers.txt" for folder in ("here", "there")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(LINES)
    here, there = (load_tokens([(str(p), 1.0)], tokenizer, 5, 30, 0).ids for p in paths)
    assert torch.equal(here, there)


def test_a_large_file_is_sampled_and_not_read_whole(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{i} {i * i}\n" for i in range(500_000)))
    counting = Counting(tokenizer)
    tokens = load_tokens([(str(path), 1.0)], counting, 16, 64, seed=0)
    assert counting.characters < path.stat().st_size / 10
    drawn = tokenizer.decode(tokens.ids.flatten(), skip_special_tokens=True)
    numbers = [int(line.split()[0]) for line in drawn.split("\n") if line.count(" ") == 1]
    assert max(numbers) - min(numbers) > 250_000  # from all over the file
    assert torch.equal(tokens.ids, load_tokens([(str(path), 1.0)], tokenizer, 16, 64, 0).ids)


def test_twice_the_tokens_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough for windows at random places, and no more text is tokenised than that."""
    monkeypatch.setattr(stream, "BATCH_BYTES", 1)  # one chunk at a time
    path = tmp_path / "large.txt"
    path.write_text(("a" * 15 + "\n") * 10_000)
    counting, count, length = Counting(Characters()), 40, 64
    load_tokens([(str(path), 1.0)], counting, count, length, seed=0)
    enough, chunk = 2 * count * length, windows.CHUNK_BYTES_PER_TOKEN * length
    assert enough <= counting.characters < enough + chunk  # a character is a token here


# Evaluation.


def test_evaluation_windows_follow_each_other(tokenizer: Any, text: Path) -> None:
    stream = encode(tokenizer, LINES)
    tokens = evaluation_tokens([(str(text), 1.0)], tokenizer, 100, None)
    count = len(stream) // 100
    assert tokens.ids.tolist() == [stream[i * 100 : (i + 1) * 100] for i in range(count)]
    first = evaluation_tokens([(str(text), 9.0)], tokenizer, 100, 3)
    assert torch.equal(first.ids, tokens.ids[:3])
    assert evaluation_tokens([(str(text), 1.0)], tokenizer, 100, 10**6).texts == tokens.texts


def test_evaluation_reads_no_more_than_it_needs(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "EVALUATION_CHUNK", 2000)
    monkeypatch.setattr(stream, "BATCH_BYTES", 2000)
    path = tmp_path / "large.txt"
    path.write_text(LINES * 20)
    counting = Counting(tokenizer)
    tokens = evaluation_tokens([(str(path), 1.0)], counting, 50, 4)
    assert tokens.ids.flatten().tolist() == encode(tokenizer, LINES)[:200]
    assert counting.characters <= 4000


def test_evaluation_refuses(tokenizer: Any, text: Path) -> None:
    with pytest.raises(InputError, match="one window needs 1,000,000"):
        evaluation_tokens([(str(text), 1.0)], tokenizer, 1_000_000, None)
    with pytest.raises(InputError, match="calibration only"):
        evaluation_tokens([("self", 1.0)], tokenizer, 10, None)
    with pytest.raises(InputError, match="limit is 0"):
        evaluation_tokens([(str(text), 1.0)], tokenizer, 10, 0)


# Special tokens that a text begins with.


@pytest.mark.parametrize(
    ("template", "tokens"),
    [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("<s> </s> $A", [0, 1]), ("$A </s>", [])],
)
def test_beginning(tokenizer: Any, template: str, tokens: list[int]) -> None:
    assert beginning(begins(tokenizer, template)).tolist() == tokens


@pytest.mark.parametrize("template", ["<s> $A", "<s> </s> $A"])
def test_sequences_begin_as_texts_do(tokenizer: Any, tmp_path: Path, template: str) -> None:
    path = tmp_path / "small.txt"
    path.write_text(LINES[:1500])
    stream = encode(tokenizer, LINES[:1500])
    beginner = begins(tokenizer, template)
    begin = beginning(beginner)
    calib = load_tokens([(str(path), 1.0)], beginner, 4, 100, seed=3).ids
    valid = evaluation_tokens([(str(path), 1.0)], beginner, 100, None).ids
    step = 100 - len(begin)
    for ids in (calib, valid):
        assert ids.shape[1] == 100
        assert (ids[:, : len(begin)] == begin).all()
        assert all(b - a >= step for a, b in pairwise(places(ids[:, len(begin) :], stream)))
    assert places(valid[:, len(begin) :], stream) == [i * step for i in range(len(valid))]
    assert len(valid) == (len(stream) - len(begin)) // step
    scored = evaluation_tokens([(str(path), 1.0)], beginner, 100, None).scored(valid[:, 1:])
    assert torch.equal(scored, valid[:, len(begin) + 1 :])  # text after text
    with pytest.raises(InputError, match=r"3 tokens, 2 of which are special.*Use at least 4"):
        load_tokens([(str(path), 1.0)], begins(tokenizer, "<s> </s> $A"), 4, 3, seed=3)


def test_a_text_that_spells_its_beginning_has_it_once(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("<s>" + LINES[:500])
    beginner = begins(tokenizer, "<s> $A")
    ids = evaluation_tokens([(str(path), 1.0)], beginner, 50, 2).ids
    stream = encode(tokenizer, "<s>" + LINES[:500])
    assert ids[0].tolist() == stream[:50]
    assert ids[1].tolist() == [0, *stream[49:98]]


def test_a_tokenizer_that_fails_is_named(tokenizer: Any, text: Path) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise KeyError("merges")

    with pytest.raises(InputError, match="tokenizer fails on the text with KeyError"):
        load_tokens([(str(text), 1.0)], failing, 4, 20, seed=3)
