"""Text in JSON: a file of objects with "text" or "messages", one a line or in one array.

Tokenized as it stands, such a file would be quotes, keys and escapes. So it is known by its content
where its name does not tell. A record is parsed when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from moepress.errors import InputError
from moepress.reading.files import read_text
from moepress.reading.json import kind_of, parse_json

Layout = Literal["lines", "array"]

LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
ARRAY = ".json"
ARRAY_BYTES = 1 << 29  # most of a file that is parsed as a whole: lines have no limit
LINE_BYTES = 1 << 24  # of a first line that is looked at
BOM = b"\xef\xbb\xbf"
ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*\{\s*\"")


def layout(path: Path, in_folder: bool) -> Layout | None:
    """How a file holds records; None: it is text as it stands.

    Args:
        in_folder: it was found in a folder of texts, which may hold JSON that is no data, such as
            the settings of a program.
    """
    if path.suffix.lower() in LINES:
        return "lines"
    with path.open("rb") as file:
        first = file.readline(LINE_BYTES).removeprefix(BOM)
        while first and not first.strip():
            first = file.readline(LINE_BYTES)
        rest = file.read(4096).strip()
    record = _parsed(first)
    named = path.suffix.lower() == ARRAY
    if isinstance(record, dict) and (_has_text(record) or (named and bool(rest))):
        return "lines"
    if ARRAY_OF_OBJECTS.match(first + rest):
        return "array" if named or _is_array(path) else None
    return "array" if named and not in_folder else None


def array_texts(path: Path, tokenizer: Any) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Name, approximate bytes, and a function that gives the text, of each record of a JSON file.

    A file that holds one object is one record.

    Raises:
        InputError: it is not JSON, or neither an array nor an object.
    """
    content = read_text(path, "The text", ARRAY_BYTES).removeprefix("\ufeff")
    try:
        value = parse_json(content)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON: {error}. Expected an array of objects, or one object a line; "
            "name it .txt if it is to be read as it stands."
        ) from error
    if not isinstance(value, list):
        value = [value]
    for number, record in enumerate(value, 1):

        def text(number: int = number, record: Any = record) -> bytes:
            return text_of(record, f"{path}, entry {number},", tokenizer).encode()

        yield f"{path}, entry {number}", len(json.dumps(record)), lru_cache(maxsize=1)(text)


def line_text(raw: bytes, name: str, tokenizer: Any) -> bytes:
    """The text of a line of JSON, in UTF-8.

    Args:
        name: of the line, for messages.

    Raises:
        InputError: it is not UTF-8, not JSON, or no record.
    """
    try:
        record = parse_json(raw.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start:,} of the line. "
            "Convert the file to UTF-8."
        ) from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}. Expected one object a line.") from error
    return text_of(record, name, tokenizer).encode()


def text_of(record: object, name: str, tokenizer: Any) -> str:
    """The "text" of a record, or its "messages" as the model's chat template writes them."""
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        found = str(sorted(record))[:200] if isinstance(record, dict) else kind_of(record)
        raise InputError(
            f'{name} has {found}. Expected an object with "text" (a string) or "messages" (a list).'
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f'{name} has "messages", but the tokenizer has no chat template to write them with. '
            'Give their text as "text".'
        )
    try:
        return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
    except Exception as error:  # a template is a program and may raise anything
        raise InputError(
            f"{name} does not fit the tokenizer's chat template: {error}. Expected messages with "
            '"role" and "content".'
        ) from error


def _has_text(record: dict[str, Any]) -> bool:
    return isinstance(record.get("text"), str) or isinstance(record.get("messages"), list)


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; None: it is none."""
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError:
        return None


def _is_array(path: Path) -> bool:
    """Whether a file is one JSON array of records; code of several languages begins like one."""
    if path.stat().st_size > ARRAY_BYTES:
        return False
    value = _parsed(path.read_bytes().removeprefix(BOM))
    records = value if isinstance(value, list) else []
    return bool(records) and all(isinstance(one, dict) and _has_text(one) for one in records)
