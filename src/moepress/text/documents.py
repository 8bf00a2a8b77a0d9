"""Documents of a text: a file, a folder, JSON, a data set, or this Python's own library.

A document is read a byte range at a time, so that of a file of a gigabyte only the ranges that are
used are read. stream.py makes token sequences of documents.
"""

from __future__ import annotations

import logging
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from moepress.errors import InputError
from moepress.reading.files import regular_file
from moepress.text.named import DATA_SETS, SELF, STDLIB, Split, load_data_set
from moepress.text.records import array_texts, layout, line_text

logger = logging.getLogger(__name__)


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
    with _reported(path):
        exists = path.exists()
    if path.is_dir():
        files = _texts_of(path)
        documents = [one for file in files for one in _of_file(file, tokenizer, True)]
    elif exists:
        documents = _of_file(regular_file(path, "The text"), tokenizer)
    else:
        raise InputError(
            f"No text '{text}'. Expected a file, a folder, or one of "
            f"{', '.join((*DATA_SETS, STDLIB, SELF))}."
        )
    if not any(document.size for document in documents):
        what = "no text files" if path.is_dir() else "no text: it is empty"
        raise InputError(f"{text} holds {what}. Expected UTF-8 text or .jsonl.")
    return documents


def _texts_of(folder: Path) -> list[Path]:
    """The text files below a folder. Others are told: a folder of data in Parquet has a README."""
    every = _visible_files(folder)
    looks = [_looks_like_text(file) for file in every]
    texts = [file for file, is_text in zip(every, looks, strict=True) if is_text]
    if texts and len(texts) < len(every):
        logger.warning(
            "%d of the %d files in %s are no UTF-8 text and are left out, such as %s",
            len(every) - len(texts), len(every), folder,
            every[looks.index(False)].relative_to(folder),
        )  # fmt: skip
    return texts


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


def _of_file(path: Path, tokenizer: Any, in_folder: bool = False) -> list[Document]:
    """One document, or one per record of a file of JSON (records.py); blank lines are none."""
    with _reported(path):
        found = layout(path, in_folder)
    if found is None:
        return [Document(str(path), path.stat().st_size, partial(_read_file, path))]
    if found == "array":
        return [
            Document(name, size, partial(_read_record, content))
            for name, size, content in array_texts(path, tokenizer)
        ]
    documents = []
    offset = 0
    # Byte ranges of a long line are read one after the other: the cache parses the line once.
    text = lru_cache(maxsize=1)(partial(_line_text, path, tokenizer))
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                read = partial(_read_record, partial(text, number, offset, len(line)))
                documents.append(Document(f"{path}, line {number}", len(line), read))
            offset += len(line)
    return documents


def _of_string(name: str, content: str) -> Document:
    raw = content.encode()
    return Document(name, len(raw), lambda start, stop: raw[start:stop])


def _read_file(path: Path, start: int, stop: int | None) -> bytes:
    with _opened(path) as file:
        file.seek(start)
        return file.read(-1 if stop is None else stop - start)


def _read_record(content: Callable[[], bytes], start: int, stop: int | None) -> bytes:
    """A byte range of the text of a record."""
    return content()[start:stop]


def _line_text(path: Path, tokenizer: Any, number: int, offset: int, size: int) -> bytes:
    """The text of a line of JSON, in UTF-8.

    Args:
        number: of the line, from 1, for messages.
        offset, size: the bytes of the line in the file.
    """
    raw = _read_file(path, offset, offset + size)
    return line_text(raw, f"{path}, line {number},", tokenizer)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with _reported(path), path.open("rb") as file:
        yield file


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn the system's errors into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"Cannot read {path}: {error.strerror}. Expected a file that can be read."
        ) from error
