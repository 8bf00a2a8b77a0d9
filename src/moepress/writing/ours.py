"""Which files moepress made, and what they hold: a file is replaced by one of its own kind only,
and one that is given in place of another is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from moepress.errors import FileError, InputError
from moepress.reading.headers import read_header
from moepress.reading.json import parse_json, read_object

Content = Literal["scores", "a calibration", "a plan", "an evaluation", "a report", "a picture"]

HEAD = 1 << 16  # bytes at the beginning of a file in which its mark is looked for
JSON_KINDS: dict[Any, Content] = {"plan": "a plan", "evaluation": "an evaluation"}
TENSOR_KINDS: dict[Any, Content] = {
    "moepress scores": "scores",
    "moepress calibration": "a calibration",
}
# The beginning of a file, what follows in its head, and what the file is.
MARKS: tuple[tuple[bytes, bytes, Content], ...] = (
    (b"<!doctype html>", b": moepress report</title>", "a report"),
    (b"\x89PNG", b"Software\0moepress", "a picture"),
    (b"<?xml", b"<dc:title>moepress</dc:title>", "a picture"),
)


def content_of(path: Path) -> Content | None:
    """What a regular file holds, if a command of moepress made it; None: anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if head.startswith(b"{"):
            fields = read_object(path, "The output")
            return JSON_KINDS.get(fields.get("kind")) if "provenance" in fields else None
        if head[8:9] == b"{":  # after the size of a header
            about = parse_json(read_header(path).metadata.get("moepress", "{}"))
            return TENSOR_KINDS.get(about.get("kind")) if isinstance(about, dict) else None
    except (OSError, InputError, TypeError):  # TypeError: the kind is a list or an object
        return None
    found = (what for begin, mark, what in MARKS if head.startswith(begin) and mark in head)
    return next(found, None)


@contextmanager
def expecting(path: Path, wanted: Content, made_by: str) -> Iterator[None]:
    """Say what a file holds that cannot be read, if a command of moepress made it for another use.

    Args:
        made_by: the command that writes what is wanted.

    Raises:
        InputError: in place of a FileError inside the `with` statement.
    """
    try:
        yield
    except FileError as error:
        found = content_of(path)
        if found in (None, wanted):
            raise
        raise InputError(f"{path} holds {found}. Expected {wanted} of `{made_by}`.") from error
