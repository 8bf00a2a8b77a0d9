"""What a source of text holds: files, folders, JSONL, data sets, or this Python's own library.

A document is read in parts, so that a file of a gigabyte costs no more than what is taken of it.
windows.py makes token sequences of them.
"""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moepress.errors import InputError

Split = Literal["calib", "valid"]

SELF, STDLIB = "self", "stdlib"
C4_DOCUMENTS = 10_000  # about 5 million tokens, the first 20 MB of its first file
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra",
    "number_theory", "prealgebra", "precalculus",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text that is read in parts."""

    name: str  # for messages
    size: int  # bytes: of a file exactly, of a line of JSON with its quoting
    read: Callable[[int, int | None], bytes]  # UTF-8 from a byte to another; None: to the end


def documents_of(source: str, tokenizer: Any, split: Split) -> list[Document]:
    """The documents of a source other than "self"."""
    if source in DATA_SETS:
        return [_of_text(source, text) for text in _fetch(source, split)]
    if source == STDLIB:
        from moepress.demo.corpus import corpus

        return [_of_text(f"stdlib {document.name}", document.text) for document in corpus(split)]
    path = Path(source)
    if path.is_dir():
        files = [file for file in _visible_files(path) if _looks_like_text(file)]
        documents = [document for file in files for document in _of_file(file, tokenizer)]
    elif path.is_file():
        documents = _of_file(path, tokenizer)
    else:
        raise InputError(
            f"No text '{source}'. Expected a file, a folder, or one of "
            f"{', '.join((*DATA_SETS, STDLIB, SELF))}."
        )
    if not any(document.size for document in documents):
        what = "no text files" if path.is_dir() else "no text: it is empty"
        raise InputError(f"{source} holds {what}. Expected UTF-8 text or .jsonl.")
    return documents


def _visible_files(folder: Path) -> list[Path]:
    inside = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
    return [inside[p] for p in sorted(shown, key=Path.as_posix)]


def _looks_like_text(path: Path) -> bool:
    """Whether a file of a folder begins as text does; images and the like are not for us."""
    with _opened(path) as file:
        head = file.read(8192)
    try:
        getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _of_file(path: Path, tokenizer: Any) -> list[Document]:
    if path.suffix != ".jsonl":
        return [Document(str(path), path.stat().st_size, partial(_read_file, path))]
    documents = []
    offset = 0
    # Parts of a long line are asked for one after the other: it is parsed once for all of them.
    text = lru_cache(maxsize=1)(partial(_line_text, path, tokenizer))
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                read = partial(_read_line, text, (number, offset, len(line)))
                documents.append(Document(f"{path}, line {number}", len(line), read))
            offset += len(line)
    return documents


def _of_text(name: str, text: str) -> Document:
    raw = text.encode()
    return Document(name, len(raw), lambda start, stop: raw[start:stop])


def _read_file(path: Path, start: int, stop: int | None) -> bytes:
    with _opened(path) as file:
        file.seek(start)
        return file.read(-1 if stop is None else stop - start)


def _read_line(
    text: Callable[..., bytes], place: tuple[int, int, int], start: int, stop: int | None
) -> bytes:
    return text(*place)[start:stop]


def _line_text(path: Path, tokenizer: Any, number: int, offset: int, size: int) -> bytes:
    """The text, in UTF-8, that a line of a .jsonl file stands for."""
    name = f"{path}, line {number},"
    try:
        fields = json.loads(_read_file(path, offset, offset + size))
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
    except Exception as error:  # templates are programs, and fail as they please
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


# Data sets, with the configurations usual for GPTQ.


def _fetch(name: str, split: Split) -> list[str]:
    """The documents of a data set."""
    otherwise = f"Give a text file instead, or '{STDLIB}', or '{SELF}' (the model's own samples)."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"Data set '{name}' needs the datasets library, which is not installed: "
            f"pip install 'moepress[datasets]'. {otherwise}"
        ) from error
    try:
        return DATA_SETS[name](load_dataset, split)
    except Exception as error:  # the library, the network and file systems each raise their own
        raise InputError(
            f"Data set '{name}' cannot be loaded, {type(error).__name__}: {error}. It needs the "
            f"network. {otherwise}"
        ) from error


def _c4(load: Callable[..., Any], split: Split) -> list[str]:
    file, part = {
        "calib": ("en/c4-train.00000-of-01024.json.gz", "train"),
        "valid": ("en/c4-validation.00000-of-00008.json.gz", "validation"),
    }[split]
    rows = load("allenai/c4", data_files={part: file}, split=part, streaming=True)
    return [row["text"] for row in islice(rows, C4_DOCUMENTS)]


def _wikitext2(load: Callable[..., Any], split: Split) -> list[str]:
    """One document: rows are lines, joined by blank ones as in GPTQ's code."""
    part = {"calib": "train", "valid": "test"}[split]
    rows = load("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    return ["\n\n".join(row["text"] for row in rows)]


def _math(load: Callable[..., Any], split: Split) -> list[str]:
    """MATH (arXiv:2103.03874), each problem with its solution."""
    part = {"calib": "train", "valid": "test"}[split]
    return [
        f"{row['problem']}\n\n{row['solution']}"
        for subject in MATH_SUBJECTS
        for row in load("EleutherAI/hendrycks_math", subject, split=part)
    ]


DATA_SETS: dict[str, Callable[[Callable[..., Any], Split], list[str]]] = {
    "c4": _c4,
    "wikitext2": _wikitext2,
    "math": _math,
}


def not_text(name: str, byte: int) -> InputError:
    return InputError(
        f"{name} is not UTF-8 text: see byte {byte:,}. Expected a text file, a .jsonl file or a "
        "folder of them."
    )
