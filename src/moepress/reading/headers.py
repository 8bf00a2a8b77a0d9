"""The header of a safetensors file: dtype, shape and place of every tensor. No weight is read.

The format: 8 bytes with the size of the header, little-endian; the header, which is a JSON object;
the bytes of the tensors, without gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.errors import FileError, InputError, printable
from moepress.reading.files import regular_file
from moepress.reading.json import parse_json

MOST_HEADER_BYTES = 100_000_000  # as of safetensors itself
MOST_SIZES = 32  # of a shape: more than torch can use
METADATA = "__metadata__"
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """A tensor as a file holds it."""

    dtype: str  # safetensors' name, such as "BF16" or "F8_E4M3"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds; its size agrees with that."""

    path: Path
    tensors: Mapping[str, Entry]  # by name, in the order of their bytes
    metadata: Mapping[str, str]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file, in time and memory of the header's size.

    Raises:
        FileError: it is no regular file, or it is cut, has more bytes than its tensors, or its
            header is damaged.
    """
    path = regular_file(path, "The safetensors file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise InputError(
                    f"it has {size:,} bytes and says that its header has {length:,}. Expected a "
                    "header inside the file"
                )
            raw = file.read(length)
        return _header(path, raw, size)
    except (OSError, ValueError) as error:  # InputError and UnicodeDecodeError are ValueErrors
        raise FileError(
            f"{path} cannot be read as safetensors: {error}. It is cut or damaged: fetch or copy "
            "it again."
        ) from error


def _header(path: Path, raw: bytes, size: int) -> Header:
    fields = parse_json(raw.decode("utf-8"))
    if not isinstance(fields, dict):
        raise InputError("its header is no JSON object")
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{METADATA} holds other values than strings")
    first = 8 + len(raw)
    tensors = {name: _entry(name, value, first) for name, value in fields.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = first
    for name, entry in ordered.items():
        if entry.start != end:
            raise InputError(
                f"tensor {printable(name)} begins at byte {entry.start:,}, expected byte {end:,}: "
                "tensors overlap or leave gaps"
            )
        end = entry.stop
    if end != size:
        raise InputError(f"its tensors end at byte {end:,}, the file at byte {size:,}")
    return Header(path, ordered, metadata)


def _entry(name: str, value: Any, first: int) -> Entry:
    """A tensor of the header, checked by itself.

    Args:
        first: the byte of the file at which tensors begin.
    """
    if not isinstance(value, dict) or value.keys() != FIELDS:
        raise InputError(f"tensor {printable(name)} has other fields than {sorted(FIELDS)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise InputError(f"tensor {printable(name)} is of unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(
            f"tensor {printable(name)} has shape {str(shape)[:80]} at {str(offsets)[:80]}. "
            "Expected sizes, and two places"
        )
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if 8 * (offsets[1] - offsets[0]) != bits:
        raise InputError(
            f"tensor {printable(name)} of shape {shape} {dtype} has "
            f"{offsets[1] - offsets[0]:,} bytes. Expected {-(-bits // 8):,}"
        )
    return Entry(dtype, tuple(shape), first + offsets[0], first + offsets[1])


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MOST_SIZES:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)
