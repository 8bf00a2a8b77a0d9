"""Documents of files, folders and named texts; each bad input has its own clear error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moepress.errors import InputError
from moepress.text import named
from moepress.text.corpus import corpus
from moepress.text.windows import evaluation_tokens, load_tokens
from tests.text.conftest import EOS, LINES, Counting, encode, joined

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


def test_a_long_jsonl_line_is_sampled_in_chunks(tokenizer: Any, tmp_path: Path) -> None:
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
        (b"\xff\xfe", "line 2, is not UTF-8 text"),
        (b'{"text": "caf\xe9"}', "line 2, is not UTF-8 text"),
        ("[1, 2]", "line 2, has an array"),
        ('{"text": "a", "text": "b"}', "line 2, is not JSON: key 'text' is there twice"),
        ('{"text": "a", "score": NaN}', "line 2, is not JSON: NaN"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2, is not JSON: a number has 5,000"),
        ("[" * 10_000, "line 2, is not JSON: objects and arrays are nested too deep"),
        (r'{"text": "\ud800"}', "line 2, is not JSON: a string is no Unicode"),
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
        ("naïve".encode("latin-1") * 3, "is not UTF-8 text: see byte 2, line 1"),
        (b"one\ntwo\n\xff", "is not UTF-8 text: see byte 8, line 3"),
        ("text".encode("utf-16"), "is not UTF-8 text: see byte 0"),
    ],
)
def test_files_that_are_no_text(
    tokenizer: Any, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokens([(str(path), 1.0)], tokenizer, 1, 4, 0)


RECORDS = [{"text": 'one "quoted" line\nand another', "id": 3}, {"text": "two"}]


LAYOUTS = {
    "\n".join(map(json.dumps, RECORDS)): ["jsonl", "JSONL", "ndjson", "json", "txt"],
    json.dumps(RECORDS): ["json", "JSON", "txt"],
    "\ufeff" + json.dumps(RECORDS, indent=2): ["json", "txt"],
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("content", "suffix"), [(content, s) for content, names in LAYOUTS.items() for s in names]
)
def test_json_is_data_under_every_name(
    tokenizer: Any, tmp_path: Path, content: str, suffix: str, folder: bool
) -> None:
    name = f"a.{suffix}"
    (tmp_path / name).write_text(content, encoding="utf-8")
    expected = joined(tokenizer, [str(record["text"]) for record in RECORDS])
    given = tmp_path if folder else tmp_path / name
    tokens = evaluation_tokens([(str(given), 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"body": "x"}]', r"entry 1, has \['body'\]"),
        ('[{"text": "x"}, 3]', "entry 2, has a number"),
        ('{"body": "x"}\n{"body": "y"}', r"line 1, has \['body'\]"),
        ('{"data": [{"text": "x"}]}', r"entry 1, has \['data'\]"),
        ('"text"', "entry 1, has a string"),
        ('[{"text": "x"},', "is not JSON"),
        ("just words", "is not JSON"),
    ],
)
def test_other_json_is_refused(tokenizer: Any, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        evaluation_tokens([(str(path), 1.0)], tokenizer, 2, None)


def test_files_of_a_folder_that_are_no_text_are_told(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A data set as the hub has it: without a word its README would be the text."""
    (tmp_path / "README.md").write_text("This is a data set of texts.\n" * 9)
    evaluation_tokens([(str(tmp_path), 1)], tokenizer, 4, 1)
    assert not caplog.records
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / "data" / f"{number}.parquet").write_bytes(b"PAR1\0\xff")
    evaluation_tokens([(str(tmp_path), 1)], tokenizer, 4, 1)
    (told,) = caplog.messages
    assert told.startswith("2 of the 3 files in ") and told.endswith("such as data/0.parquet")


def test_what_only_looks_like_json_is_text(tokenizer: Any, tmp_path: Path) -> None:
    texts = {"a.json": '{"name": "app", "version": 3}\n', "b.txt": '[{"a": 1}, more words\n'}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    expected = joined(tokenizer, list(texts.values()))
    tokens = evaluation_tokens([(str(tmp_path), 1.0)], tokenizer, len(expected), None)
    assert tokens.ids.tolist() == [expected]


def test_files_that_are_no_files(tokenizer: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in {
        str(tmp_path / "pipe"): "is a pipe",
        str(tmp_path / "loop"): "No text",
        "/dev/zero": "is a device",
        "nul\0": "No text",
        "x" * 5000: "too long",
    }.items():
        with pytest.raises(InputError, match=message):
            load_tokens([(name, 1.0)], tokenizer, 1, 4, 0)


def test_a_tokenizer_that_fails(text: Path) -> None:
    class Broken:
        eos_token_id = 0

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise KeyError("no such token")

    with pytest.raises(InputError, match="tokenizer fails on the text with KeyError"):
        load_tokens([(str(text), 1.0)], Broken(), 1, 4, 0)


def test_other_refusals(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = str(text)
    cases: list[tuple[list[tuple[str, float]], int, str]] = [
        ([], 4, "Expected at least one"),
        ([("wiki", 1.0)], 4, "No text 'wiki'.*c4, wikitext2, math, stdlib, self"),
        ([(str(tmp_path / "empty"), 1.0)], 4, "no text files"),
        ([(good, 1.0), (good, 2.0)], 4, "given twice"),
        ([(good, 0.0)], 4, "weight 0.0"),
        ([(good, math.nan)], 4, "weight nan"),
        ([(good, 1.0)], 1, "Use at least 2"),
    ]
    for texts, length, message in cases:
        with pytest.raises(InputError, match=message):
            load_tokens(texts, tokenizer, 4, length, 0)


def test_an_unreadable_file(tokenizer: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"Cannot read .*: Permission denied"):
        load_tokens([(str(text), 1.0)], tokenizer, 1, 4, 0)


# Named texts.


def test_stdlib_keeps_calibration_and_evaluation_apart(tokenizer: Any) -> None:
    drawn = load_tokens([("stdlib", 1.0)], tokenizer, 8, 64, 0)
    assert drawn.texts == ("stdlib",) * 8
    held_out = evaluation_tokens([("stdlib", 1.0)], tokenizer, 64, 50)
    assert tokenizer.decode(held_out.ids[0])[:40] == corpus("valid")[0].text[:40]
    calib = "\n".join(document.text for document in corpus("calib"))
    for row in drawn.ids:
        pieces = tokenizer.decode(row).strip("\ufffd").split("</s>")
        assert all(piece in calib for piece in pieces)


def fake_datasets(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Replace the module `datasets`; returns the list of calls made to it."""
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
        return ({"text": f"{options['split']} {i}\n"} for i in iter(int, 1))  # endless

    monkeypatch.setattr(named, "C4_DOCUMENTS", 40)
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
    assert {args[1] for args, _ in calls} == set(named.MATH_SUBJECTS)


def test_data_sets_without_library_or_network(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"'\.\[datasets\]' in the clone.*'self'"):
        load_tokens([("c4", 1.0)], tokenizer, 1, 8, 0)

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(InputError, match=r"ConnectionError: Couldn't reach.*network.*'self'"):
        load_tokens([("c4", 1.0)], tokenizer, 1, 8, 0)
