"""Which files moepress made: only these are replaced."""

from __future__ import annotations

import json
from pathlib import Path

HEAD = 1 << 16  # bytes at the beginning of a file in which its mark is looked for
JSON_KINDS = ("plan", "evaluation")  # of JSON files, in their field "kind"
MARKS = (  # the beginning of a file, and what follows in its head
    (b"<!doctype html>", b": moepress report</title>"),
    (b"\x89PNG", b"Software\0moepress"),
    (b"<?xml", b"<dc:title>moepress</dc:title>"),
)
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself


def is_ours(path: Path) -> bool:
    """Whether moepress made a regular file, by its content. An empty file may be replaced too."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            if not head:
                return True
            if head.startswith(b"{"):
                return _is_our_json(head + file.read())
            size = int.from_bytes(head[:8], "little")
            if head[8:9] == b"{" and size <= LARGEST_HEADER:
                file.seek(8)
                return _is_our_header(file.read(size))
    except OSError:
        return False
    return any(head.startswith(begin) and mark in head for begin, mark in MARKS)


def _is_our_json(content: bytes) -> bool:
    fields = _object(content)
    return fields.get("kind") in JSON_KINDS and "provenance" in fields


def _is_our_header(content: bytes) -> bool:
    metadata = _object(content).get("__metadata__")
    return isinstance(metadata, dict) and "moepress" in metadata


def _object(content: bytes) -> dict[str, object]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
