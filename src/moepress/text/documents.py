"""Documents of a text: a file, a folder, JSON, a data set, or this Python's own library.

JSON lines, and a .json file with an array, hold one document each line or item. Other JSON is data
and no text: given by name it is refused; inside a folder it is read as it stands, like code.

A document is read a byte range at a time, so that of a file of a gigabyte only the ranges that are
used are read. stream.py makes token sequences of documents.
"""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from moepress.errors import InputError
from moepress.reading.files import read_text
from moepress.text.named import DATA_SETS, SELF, STDLIB, Split, load_data_set

LINES = (".jsonl", ".ndjson", ".jsonlines")  # suffixes of JSON lines
WHOLE = ".json"  # an array, or JSON lines
MOST_WHOLE = 1 << 30  # bytes of a .json file, which is read whole


@dataclass(frozen=True)
class Document:
    """Continuous text that can be read a byte range at a time."""

    name: str  # for messages
    size: int  # bytes: of a file exactly, of a line of JSON with its quoting
    read: Callable[[int, int | None], bytes]  # UTF-8, bytes start .. stop - 1; None: to the end


def documents_of(text: str, tokenizer: Any, split: Split) -> list[Document]:
    """The documents of a text other than "self".

    Args:
        text: a path, or a name in named.py; a name wins over a path.
        tokenizer: writes "messages" of JSONL with its chat template.
        split: which split of a data set or of `stdlib`; files have none.

    Raises:
        InputError: there is no such text, it is empty, or it cannot be read.
    """
    if text in DATA_SETS:
        return [_of_string(text, content) for content in load_data_set(text, split)]
    if text == STDLIB:
        from moepress.text.corpus import corpus

        return [_of_string(f"stdlib {document.name}", document.text) for document in corpus(split)]
    path = Path(text)
    if path.is_dir():
        files = [file for file in _visible_files(path) if _looks_like_text(file)]
        documents = [document for file in files for document in _of_file(file, tokenizer)]
    elif path.is_file():
        documents = _of_file(path, tokenizer, named=True)
    else:
        raise InputError(
            f"No text '{text}'. Expected a file, a folder, or one of "
            f"{', '.join((*DATA_SETS, STDLIB, SELF))}."
        )
    if not any(document.size for document in documents):
        what = "no text files" if path.is_dir() else "no text: it is empty"
        raise InputError(f"{text} holds {what}. Expected UTF-8 text or .jsonl.")
    return documents


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder in order of path, without hidden ones and hidden folders."""
    inside = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = [p for p in inside if not any(name.startswith(".") for name in p.parts)]
    return [inside[p] for p in sorted(shown, key=Path.as_posix)]


def _looks_like_text(path: Path) -> bool:
    """Whether a file begins with UTF-8 and no NUL; images and the like do not."""
    with _opened(path) as file:
        head = file.read(8192)
    try:
        getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _of_file(path: Path, tokenizer: Any, named: bool = False) -> list[Document]:
    """One document, or one per line or item of a file of JSON.

    Args:
        named: whether the file was given by its name, and not found in a folder.
    """
    suffix = path.suffix.lower()
    if suffix in LINES:
        return _of_lines(path, tokenizer)
    if suffix == WHOLE:
        found = _of_json(path, tokenizer)
        if found:
            return found
        if named:
            raise InputError(
                f"{path} is JSON without texts. Expected an array, or lines, of objects with "
                '"text" (a string) or "messages" (a list). To read it as it stands, give it the '
                "suffix .txt."
            )
    return [Document(str(path), path.stat().st_size, partial(_read_file, path))]


def _of_json(path: Path, tokenizer: Any) -> list[Document]:
    """The documents of a .json file: items of an array, or lines; none: it holds other data."""
    try:
        value = _parsed(read_text(path, "The text", MOST_WHOLE))
    except ValueError:  # no JSON as a whole; FileError is one
        with _opened(path) as file:
            first = next((line for line in file if line.strip()), b"")
        try:
            return _of_lines(path, tokenizer) if _has_text(_parsed(first)) else []
        except ValueError:
            return []
    items = value if isinstance(value, list) else [value]
    if not items or not all(map(_has_text, items)):
        return []
    return [
        _of_string(name, _text_of(item, name, tokenizer))
        for number, item in enumerate(items, 1)
        for name in (f"{path}, item {number},",)
    ]


def _has_text(value: object) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"text", "messages"})


def _parsed(text: str | bytes) -> Any:
    """A JSON value. Data sets have NaN in other fields, so it is read as Python reads it.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError("objects and arrays are nested too deep") from error


def _of_lines(path: Path, tokenizer: Any) -> list[Document]:
    """One document per line that is not blank."""
    documents = []
    offset = 0
    # Byte ranges of a long line are read one after the other: the cache parses the line once.
    line_text = lru_cache(maxsize=1)(partial(_line_text, path, tokenizer))
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                read = partial(_read_line, line_text, (number, offset, len(line)))
                documents.append(Document(f"{path}, line {number}", len(line), read))
            offset += len(line)
    return documents


def _of_string(name: str, content: str) -> Document:
    raw = content.encode(errors="replace")
    return Document(name, len(raw), lambda start, stop: raw[start:stop])


def _read_file(path: Path, start: int, stop: int | None) -> bytes:
    with _opened(path) as file:
        file.seek(start)
        return file.read(-1 if stop is None else stop - start)


def _read_line(
    line_text: Callable[..., bytes], place: tuple[int, int, int], start: int, stop: int | None
) -> bytes:
    """A byte range of the text of a JSONL line; `place` is its (number, offset, size)."""
    return line_text(*place)[start:stop]


def _line_text(path: Path, tokenizer: Any, number: int, offset: int, size: int) -> bytes:
    """The text of a JSONL line, in UTF-8.

    Args:
        number: of the line, from 1, for messages.
        offset, size: the bytes of the line in the file.
    """
    name = f"{path}, line {number},"
    try:
        fields = _parsed(_read_file(path, offset, offset + size))
    except ValueError as error:  # UnicodeDecodeError is one
        raise InputError(f"{name} is not JSON: {error}. Expected one object a line.") from error
    return _text_of(fields, name, tokenizer).encode(errors="replace")


def _text_of(fields: object, name: str, tokenizer: Any) -> str:
    """The "text" of an object, or its "messages" as the model's chat template writes them."""
    if isinstance(fields, dict) and isinstance(fields.get("text"), str):
        return str(fields["text"])
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InputError(
            f'{name} has {found}. Expected an object with "text" (a string) or "messages" (a list).'
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f'{name} has "messages", but the tokenizer has no chat template to write them with. '
            'Give their text as "text".'
        )
    try:
        return str(tokenizer.apply_chat_template(fields["messages"], tokenize=False))
    except Exception as error:  # a template is a program and may raise anything
        raise InputError(
            f"{name} does not fit the tokenizer's chat template: {error}. Expected messages with "
            '"role" and "content".'
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"Cannot read {path}: {error.strerror}. Expected a file that can be read."
        ) from error
