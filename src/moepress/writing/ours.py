"""Which files moepress made: only these are replaced."""

from __future__ import annotations

from pathlib import Path

from moepress.errors import InputError
from moepress.reading.headers import read_header
from moepress.reading.json import read_object

HEAD = 1 << 16  # bytes at the beginning of a file in which its mark is looked for
JSON_KINDS = ("plan", "evaluation")  # of JSON files, in their field "kind"
MARKS = (  # the beginning of a file, and what follows in its head
    (b"<!doctype html>", b": moepress report</title>"),
    (b"\x89PNG", b"Software\0moepress"),
    (b"<?xml", b"<dc:title>moepress</dc:title>"),
)


def is_ours(path: Path) -> bool:
    """Whether moepress made a regular file, by its content. An empty file may be replaced too."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if not head:
            return True
        if head.startswith(b"{"):
            fields = read_object(path, "The output")
            return fields.get("kind") in JSON_KINDS and "provenance" in fields
        if head[8:9] == b"{":  # after the size of a header
            return "moepress" in read_header(path).metadata
    except (OSError, InputError):
        return False
    return any(head.startswith(begin) and mark in head for begin, mark in MARKS)
