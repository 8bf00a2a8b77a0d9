"""Sequences are whole, contiguous pieces of the text; each bad input has its one clear error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moepress.demo.corpus import corpus
from moepress.errors import InputError
from moepress.text import documents, windows
from moepress.text.windows import (
    Tokens,
    check_vocab,
    divide,
    evaluation_tokens,
    load_tokens,
    parse_source,
)
from tests.conftest import make_model

LINES = "".join(f"{i} is a number after {i - 1}, né?\n" for i in range(700))
EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few lines, with <s> = 0 and </s> = 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([LINES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text(LINES)
    return path


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def joined(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """What a stream of documents should be."""
    ids = encode(tokenizer, texts[0])
    for following in texts[1:]:
        ids += [EOS, *encode(tokenizer, following)]
    return ids


def places(windows: torch.Tensor, stream: list[int]) -> list[int]:
    """Where each window begins in a stream of tokens; every window must be in it."""
    length = windows.shape[1]
    starts = {tuple(stream[i : i + length]): i for i in range(len(stream) - length + 1)}
    return [starts[tuple(window.tolist())] for window in windows]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.characters = 0
        self.eos_token_id = inner.eos_token_id

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.inner(texts, **options)


# Sources and their weights.


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
def test_parse_source(spelled: str, expected: tuple[str, float]) -> None:
    assert parse_source(spelled) == expected


@pytest.mark.parametrize("spelled", ["", "=2", "wiki=0", "wiki=-1", "wiki=1e999"])
def test_parse_source_refuses(spelled: str) -> None:
    with pytest.raises(InputError, match="expected PATH or PATH=WEIGHT"):
        parse_source(spelled)


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=8).flatmap(
        lambda weights: st.tuples(st.just(weights), st.integers(len(weights), 500))
    )
)
def test_divide_gives_every_source_its_share(case: tuple[list[float], int]) -> None:
    weights, total = case
    shares = divide(total, weights)
    quotas = [total * weight / sum(weights) for weight in weights]
    assert sum(shares) == total
    assert min(shares) >= 1
    if min(quotas) >= 1:  # then nothing stands in the way of largest remainder
        assert all(abs(s - q) < 1 + 1e-9 for s, q in zip(shares, quotas, strict=True))
        remainders = sorted((q - math.floor(q) for q in quotas), reverse=True)
        given_up = [q - math.floor(q) for s, q in zip(shares, quotas, strict=True) if s > q]
        assert all(r >= remainders[len(given_up) - 1] - 1e-9 for r in given_up)


def test_divide_examples() -> None:
    assert divide(10, [1, 1, 1]) == [4, 3, 3]
    assert divide(4, [1000, 1, 1]) == [2, 1, 1]
    with pytest.raises(InputError, match="3 texts share 2 sequences"):
        divide(2, [1, 1, 1])


# Windows.


def test_windows_are_contiguous_and_do_not_overlap(tokenizer: Any, text: Path) -> None:
    tokens = load_tokens([(str(text), 1.0)], tokenizer, 7, 33, seed=0)
    assert tokens.ids.shape == (7, 33)
    assert tokens.ids.dtype == torch.int64
    assert tokens.sources == (str(text),) * 7
    # A part holds 528 bytes here, so windows come from a sample of parts, with EOS between them.
    decoded = [tokenizer.decode(row) for row in tokens.ids]
    assert len(set(decoded)) == 7
    for piece in "</s>".join(decoded).split("</s>"):
        assert piece.strip("\ufffd") in LINES  # a window may begin or end inside an é


def test_windows_of_a_small_text_lie_in_its_token_stream(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text(LINES[:1500])
    stream = encode(tokenizer, LINES[:1500])
    length = 100  # a part is larger than the file
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


def test_the_seed_decides_and_other_sources_do_not(tokenizer: Any, tmp_path: Path) -> None:
    a, b = (tmp_path / name for name in ("a.txt", "b.txt"))
    a.write_text(LINES)
    b.write_text(LINES.upper())
    both = load_tokens([(str(a), 1.0), (str(b), 1.0)], tokenizer, 6, 40, seed=1)
    turned = load_tokens([(str(b), 1.0), (str(a), 1.0)], tokenizer, 6, 40, seed=1)
    alone = load_tokens([(str(a), 1.0)], tokenizer, 3, 40, seed=1)
    assert both.sources == (str(a),) * 3 + (str(b),) * 3
    assert torch.equal(both.ids, turned.ids.roll(3, 0))
    assert torch.equal(both.ids[:3], alone.ids)
    other = load_tokens([(str(a), 1.0)], tokenizer, 3, 40, seed=2)
    assert not torch.equal(alone.ids, other.ids)


def test_weights_divide_the_sequences(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(LINES)
    sources = [(str(tmp_path / "a"), 3.0), (str(tmp_path / "b"), 1.0)]
    assert load_tokens(sources, tokenizer, 8, 20, 0).sources == tuple(
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


@given(st.text(alphabet="aé漢🙂\n", max_size=200), st.integers(4, 40))
def test_parts_make_up_the_text(text: str, part_bytes: int) -> None:
    document = documents._of_text("text", text)
    (count,) = windows._part_counts([document], part_bytes)
    parts = [windows._part(document, i, count, part_bytes) for i in range(count)]
    assert "".join(parts) == text


@given(st.lists(st.text(alphabet="ab\n", max_size=40), min_size=1, max_size=6), st.data())
def test_stream_puts_eos_where_text_is_missing(texts: list[str], draw: st.DataObject) -> None:
    """Against a plain retelling, with a tokenizer of one token per character."""

    class Characters:
        eos_token_id = 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    part_bytes = 8
    given_documents = [documents._of_text("text", text) for text in texts]
    counts = windows._part_counts(given_documents, part_bytes)
    total = sum(counts)
    order = draw.draw(st.permutations(range(total)))[: draw.draw(st.integers(0, total))]
    stream = windows._stream(given_documents, order, part_bytes, Characters(), math.inf)

    expected: list[int] = []
    last: tuple[int, int] | None = None  # document and part that the stream goes on from
    index = 0
    for which, count in enumerate(counts):
        for part in range(count):
            if index in order:
                piece = windows._part(given_documents[which], part, count, part_bytes)
                if piece:
                    follows = last == (which, part - 1)
                    expected += [] if follows or not expected else [0]
                    expected += [ord(c) for c in piece]
                    last = (which, part)
                elif last == (which, part - 1):
                    last = (which, part)
            index += 1
    assert stream.tolist() == expected
    assert stream.dtype == torch.int64


# Evaluation.


def test_evaluation_windows_follow_each_other(tokenizer: Any, text: Path) -> None:
    stream = encode(tokenizer, LINES)
    tokens = evaluation_tokens([(str(text), 1.0)], tokenizer, 100, None)
    count = len(stream) // 100
    assert tokens.ids.tolist() == [stream[i * 100 : (i + 1) * 100] for i in range(count)]
    first = evaluation_tokens([(str(text), 9.0)], tokenizer, 100, 3)
    assert torch.equal(first.ids, tokens.ids[:3])
    assert evaluation_tokens([(str(text), 1.0)], tokenizer, 100, 10**6).sources == tokens.sources


def test_evaluation_reads_no_more_than_it_needs(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "EVALUATION_PART", 2000)
    monkeypatch.setattr(windows, "BATCH_BYTES", 2000)
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


# Files and folders.


def test_a_folder_is_its_text_files_in_order(tokenizer: Any, tmp_path: Path) -> None:
    files = {
        "b.txt": "second text\n",
        "a/z.md": "first text, né\n",
        "c.jsonl": '{"text": "third"}\n{"text": "fourth"}\n',
        "d.txt": "",
        ".git/config": "hidden",
        ".hidden.txt": "hidden",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    expected = joined(tokenizer, ["first text, né\n", "second text\n", "third", "fourth"])
    length = len(expected)
    tokens = evaluation_tokens([(str(tmp_path), 1.0)], tokenizer, length, None)
    assert tokens.ids.tolist() == [expected]
    drawn = load_tokens([(str(tmp_path), 1.0)], tokenizer, 1, length, 0)
    assert drawn.ids.tolist() == [expected]


def test_no_eos_without_one(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"text {name}\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    expected = encode(tokenizer, "text a\n") + encode(tokenizer, "text b\n")
    tokens = evaluation_tokens([(str(tmp_path), 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]


def test_line_ends_and_byte_order_mark_of_windows(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one line\r\nanother\r\n")
    expected = encode(tokenizer, "one line\nanother\n")
    tokens = evaluation_tokens([(str(path), 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]


def test_jsonl_messages_go_through_the_chat_template(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    path = tmp_path / "chats.jsonl"
    message = {"role": "user", "content": "how many?"}
    path.write_text("\n" + json.dumps({"messages": [message]}) + "\n\n")
    expected = [*encode(tokenizer, "[user] how many?"), EOS]
    tokens = evaluation_tokens([(str(path), 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]

    path.write_text(json.dumps({"messages": [message]}) + "\n" + '{"messages": [3]}\n')
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('odd') }}")
    with pytest.raises(InputError, match=r"line 1, does not fit the tokenizer's chat template"):
        evaluation_tokens([(str(path), 1.0)], tokenizer, 5, None)


def test_a_long_jsonl_line_is_sampled_in_parts(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": LINES * 30}) + "\n")
    counting = Counting(tokenizer)
    ids = load_tokens([(str(path), 1.0)], counting, 4, 16, 0).ids
    assert ids.shape == (4, 16)
    assert counting.characters < len(LINES) * 30


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2, is not JSON"),
        (b"\xff\xfe", "line 2, is not JSON"),
        ("[1, 2]", "line 2, has list"),
        ('{"body": "x"}', r"line 2, has \['body'\]"),
        ('{"text": 3}', r"line 2, has \['text'\]"),
        ('{"messages": []}', "no chat template"),
    ],
)
def test_bad_jsonl_lines(tokenizer: Any, tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    raw = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "good"}\n' + raw + b"\n")
    with pytest.raises(InputError, match=message):
        load_tokens([(str(path), 1.0)], tokenizer, 1, 4, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"plain \xff\xfe bytes" * 3, "is not UTF-8 text: see byte 6"),
        (b"abc\0def" * 3, "is not UTF-8 text: see byte 3"),
        ("naïve".encode("latin-1") * 3, "is not UTF-8 text: see byte 2"),
    ],
)
def test_files_that_are_no_text(
    tokenizer: Any, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokens([(str(path), 1.0)], tokenizer, 1, 4, 0)


def test_other_refusals(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = str(text)
    cases: list[tuple[list[tuple[str, float]], int, str]] = [
        ([], 4, "at least one source"),
        ([("wiki", 1.0)], 4, "No text 'wiki'.*c4, wikitext2, math, stdlib, self"),
        ([(str(tmp_path / "empty"), 1.0)], 4, "no text files"),
        ([(good, 1.0), (good, 2.0)], 4, "given twice"),
        ([(good, 0.0)], 4, "weight 0.0"),
        ([(good, math.nan)], 4, "weight nan"),
        ([(good, 1.0)], 1, "Use at least 2"),
    ]
    for sources, length, message in cases:
        with pytest.raises(InputError, match=message):
            load_tokens(sources, tokenizer, 4, length, 0)


def test_an_unreadable_file(tokenizer: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"Cannot read .*: Permission denied"):
        load_tokens([(str(text), 1.0)], tokenizer, 1, 4, 0)


def test_check_vocab() -> None:
    tokens = Tokens(torch.tensor([[1, 2], [3, 9]]), ("a", "b"))
    check_vocab(tokens, 10)
    with pytest.raises(InputError, match="Text b gives token 9, but the model knows 9"):
        check_vocab(tokens, 9)


# Named sources.


def test_stdlib_keeps_calibration_and_evaluation_apart(tokenizer: Any) -> None:
    drawn = load_tokens([("stdlib", 1.0)], tokenizer, 8, 64, 0)
    assert drawn.sources == ("stdlib",) * 8
    held_out = evaluation_tokens([("stdlib", 1.0)], tokenizer, 64, 50)
    assert tokenizer.decode(held_out.ids[0])[:40] == corpus("valid")[0].text[:40]
    calib = "\n".join(document.text for document in corpus("calib"))
    for row in drawn.ids:
        pieces = tokenizer.decode(row).strip("\ufffd").split("</s>")
        assert all(piece in calib for piece in pieces)


def fake_datasets(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Put a module in the place of `datasets`; returns the calls made to it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return load(*args, **options)

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_c4_streams_the_start_of_one_file(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **options: Any) -> Any:
        assert options["streaming"]
        return ({"text": f"{options['split']} {i}\n"} for i in iter(int, 1))  # has no end

    monkeypatch.setattr(documents, "C4_DOCUMENTS", 40)
    calls = fake_datasets(monkeypatch, load)
    drawn = load_tokens([("c4", 1.0)], tokenizer, 2, 20, 0)
    assert "train 0" in tokenizer.decode(drawn.ids[0])
    held_out = evaluation_tokens([("c4", 1.0)], tokenizer, 20, 2)
    assert "validation 0" in tokenizer.decode(held_out.ids[0])
    assert [args for args, _ in calls] == [("allenai/c4",)] * 2


def test_wikitext2_is_one_document(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": " = Title = \n"}, {"text": ""}, {"text": "words and words\n"}]
    calls = fake_datasets(monkeypatch, lambda *_, **__: rows)
    expected = encode(tokenizer, "\n\n".join(row["text"] for row in rows))
    tokens = evaluation_tokens([("wikitext2", 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_math_joins_problem_and_solution(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"problem": "1 + 1?", "solution": "2"}]
    calls = fake_datasets(monkeypatch, lambda *_, **__: rows)
    expected = joined(tokenizer, ["1 + 1?\n\n2"] * 7)
    tokens = evaluation_tokens([("math", 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]
    assert {args[1] for args, _ in calls} == set(documents.MATH_SUBJECTS)


def test_data_sets_without_library_or_network(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"moepress\[datasets\].*'self'"):
        load_tokens([("c4", 1.0)], tokenizer, 1, 8, 0)

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(InputError, match=r"ConnectionError: Couldn't reach.*network.*'self'"):
        load_tokens([("c4", 1.0)], tokenizer, 1, 8, 0)


# The model's own samples.


def test_own_samples(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "SELF_BATCH", 3)  # batches that do not divide the count
    model = make_model("mixtral")
    model.generation_config.top_k = 1  # the model's own settings must not matter
    model.generation_config.eos_token_id = list(range(2, 384))
    made: list[str] = []

    def give() -> Any:
        made.append("once")
        return model

    before = torch.get_rng_state()
    tokens = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=0, model=give)
    assert torch.equal(torch.get_rng_state(), before)
    assert made == ["once"]
    assert tokens.ids.shape == (4, 12)
    assert tokens.sources == ("self",) * 4
    assert not set(tokens.ids[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert len(set(tokens.ids[:, 0].tolist())) > 1
    with torch.inference_mode():
        likely = model(input_ids=tokens.ids).logits.argmax(-1)[:, :-1]
    follows = likely == tokens.ids[:, 1:]
    assert follows[:, : windows.SELF_GREEDY].all()
    assert not follows[:, windows.SELF_GREEDY :].all(dim=1).any()  # the rest is sampled
    again = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=0, model=give)
    assert torch.equal(again.ids, tokens.ids)
    other = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=1, model=give)
    assert not torch.equal(other.ids, tokens.ids)


@pytest.mark.parametrize("length", [2, 3, 7])
def test_own_samples_may_be_short(tokenizer: Any, length: int) -> None:
    model = make_model("mixtral")
    tokens = load_tokens([("self", 1.0)], tokenizer, 2, length, seed=0, model=lambda: model)
    assert tokens.ids.shape == (2, length)


def test_own_samples_begin_as_the_tokenizer_begins_texts(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    model = make_model("mixtral")
    for length in (2, 9):
        tokens = load_tokens([("self", 1.0)], beginning, 2, length, 0, model=lambda: model)
        assert tokens.ids.shape == (2, length)
        assert tokens.ids[:, 0].tolist() == [0, 0]


def test_own_samples_need_the_model(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"must fit in memory.*'stdlib'"):
        load_tokens([("self", 1.0)], tokenizer, 2, 8, 0)
