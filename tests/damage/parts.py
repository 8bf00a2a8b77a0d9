"""Damage to one file: its kind, its bytes, the fields of JSON, the header of safetensors.

Each function yields (name, apply); `apply(path)` damages the file at that path, which is a copy.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

Apply = Callable[[Path], None]
Variants = Iterator[tuple[str, Apply]]

# Values of other types, sizes and ranges than any field has. Raw JSON, as a file would hold it.
VALUES = (
    "null", "true", "false", "0", "-1", "1", "3", "4.5", "1e308", "1099511627776", "9" * 5000,
    "9" * 250, "NaN", "Infinity", "-Infinity", '""', '"x"', r'"\u001b[2J\u0000"', '"\\ud800"',
    "[]", "{}", "[1, 2]", '{"a": {}}', "[" * 10_000 + "]" * 10_000, '["x", null]',
    '"' + "y" * 9000 + '"',
)  # fmt: skip
TEXTS: tuple[tuple[str, bytes], ...] = (
    ("empty", b""), ("null", b"null"), ("list", b"[]"), ("object", b"{}"), ("number", b"5"),
    ("nested", b"[" * 100_000), ("nul", b'{"a": "\0"}'), ("latin-1", b'{"a": "\xe9"}'),
    ("bom", b"\xef\xbb\xbf{}"), ("utf-16", '{"a": 1}'.encode("utf-16")),
    ("binary", bytes(range(256))), ("digits", b"9" * 5000),
)  # fmt: skip
MARK = "@@damage@@"


# The kind of a file


def kinds(rng: random.Random) -> Variants:
    """Something else than a regular file of that name."""
    yield "missing", Path.unlink
    yield "folder", lambda path: (path.unlink(), path.mkdir())[1]
    yield "pipe", lambda path: (path.unlink(), os.mkfifo(path))[1]
    yield "device", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))[1]
    yield "null device", lambda path: (path.unlink(), path.symlink_to("/dev/null"))[1]
    yield "circle", lambda path: (path.unlink(), path.symlink_to(path.name))[1]
    yield "link to nothing", lambda path: (path.unlink(), path.symlink_to("nothing"))[1]
    yield "hole", partial(_hole, size=1 << 40)


def _hole(path: Path, size: int) -> None:
    """A file of a terabyte that takes no disk."""
    with path.open("wb") as file:
        file.truncate(size)


# Bytes


def texts() -> Variants:
    """Other content of a text file."""
    for name, content in TEXTS:
        yield name, partial(_write, content=content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def damaged_bytes(path: Path, rng: random.Random, count: int) -> Variants:
    """Flipped bits, cut files, bytes added, zeros."""
    size = path.stat().st_size
    for _ in range(count):
        place = rng.randrange(max(1, size))
        yield f"bit at {place}", partial(_flip, place=place, bit=rng.randrange(8))
    for place in {0, 1, 7, 8, 9, size // 2, size - 1, rng.randrange(max(1, size))}:
        yield f"cut at {place}", partial(_cut, place=place)
    yield "one byte more", lambda to: _write(to, to.read_bytes() + b"x")
    yield "zeros", lambda to: _write(to, bytes(to.stat().st_size))


def _flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def _cut(path: Path, place: int) -> None:
    path.write_bytes(path.read_bytes()[:place])


# JSON


def json_fields(value: Any, rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """(what was changed, JSON text) of `count` single changes of a JSON value."""
    places = list(_places(value))
    if not places:
        return
    for _ in range(count):
        place = rng.choice(places)
        changed = deepcopy(value)
        owner: Any = changed
        for key in place[:-1]:
            owner = owner[key]
        what = rng.choice(("value", "value", "value", "remove", "rename", "twice", "add"))
        name = ".".join(map(str, place))
        if what == "remove":
            del owner[place[-1]]
            yield f"{name} removed", json.dumps(changed)
        elif what == "rename" and isinstance(owner, dict):
            owner[f"{place[-1]}x"] = owner.pop(place[-1])
            yield f"{name} renamed", json.dumps(changed)
        elif what == "add" and isinstance(owner, dict):
            owner["unknown_field"] = 1
            yield f"field beside {name}", json.dumps(changed)
        elif what == "twice" and isinstance(owner, dict):
            owner[MARK] = owner[place[-1]]
            text = json.dumps(changed).replace(json.dumps(MARK), json.dumps(place[-1]))
            yield f"{name} twice", text
        else:
            owner[place[-1]] = MARK
            new = rng.choice((*VALUES, *_near(value, place)))
            yield f"{name} = {new[:20]}", json.dumps(changed).replace(json.dumps(MARK), new)


def _near(value: Any, place: tuple[Any, ...]) -> tuple[str, ...]:
    """Values like the one at a place: of the same type, another number or order."""
    for key in place:
        value = value[key]
    if isinstance(value, bool):
        return (json.dumps(not value),)
    if isinstance(value, int):
        return tuple(map(str, (value + 1, value - 1, 2 * value, -value, float(value))))
    if isinstance(value, str):
        return tuple(map(json.dumps, (value[::-1], value + "x", value[:-1])))
    return ()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def damaged_json(path: Path, rng: random.Random, count: int) -> Variants:
    """Other fields of a JSON file, and other content."""
    value = json.loads(path.read_text(encoding="utf-8"))
    for name, text in json_fields(value, rng, count):
        yield name, partial(_write, content=text.encode("utf-8", "surrogatepass"))
    yield from texts()


# safetensors


def damaged_header(path: Path, rng: random.Random, count: int) -> Variants:
    """Other headers of a safetensors file: other types, dtypes, shapes, names, places."""
    header, data = read_parts(path)
    for name, text in json_fields(header, rng, count):
        yield (
            f"header: {name}",
            partial(with_header, header=text.encode("utf-8", "surrogatepass"), data=data),
        )
    for name, length in (("0", 0), ("2^40", 1 << 40), ("2^64", (1 << 64) - 1)):
        yield f"length of the header {name}", partial(_with_length, length=length)
    tensors = [name for name in header if name != "__metadata__"]
    for name in rng.sample(tensors, min(len(tensors), count // 4)):
        for what, changed in _tensors_changed(header, name, rng):
            yield (
                f"{name} {what}",
                partial(with_header, header=json.dumps(changed).encode(), data=data),
            )


def _tensors_changed(
    header: dict[str, Any], name: str, rng: random.Random
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Headers that are valid by themselves, and describe other tensors in the same bytes."""
    entry = header[name]
    same_size = {"BF16": "F16", "F16": "BF16", "F32": "I32", "U8": "I8", "I64": "F64", "F64": "I64"}
    if entry["dtype"] in same_size:
        yield "of another dtype", {**header, name: {**entry, "dtype": same_size[entry["dtype"]]}}
    shape = entry["shape"]
    if len(shape) > 1:
        yield "transposed", {**header, name: {**entry, "shape": shape[::-1]}}
    yield "of more dimensions", {**header, name: {**entry, "shape": [1, *shape]}}
    yield "renamed", {(f"{key}x" if key == name else key): one for key, one in header.items()}
    others = [
        k
        for k, e in header.items()
        if k not in ("__metadata__", name) and e["dtype"] == entry["dtype"]
    ]
    if others:
        other = rng.choice(others)
        yield f"exchanged with {other}", {**header, name: header[other], other: entry}


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    raw = path.read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:stop]), raw[stop:]


def with_header(path: Path, header: bytes, data: bytes) -> None:
    """Write a safetensors file of a header and what follows it."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def _with_length(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
