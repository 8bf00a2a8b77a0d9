"""Safetensors files whose tensors begin at whole cache lines, so that mapped codes are read fast.

The format lets tensors follow each other in any order, without gaps, and lets spaces follow the
header (https://github.com/huggingface/safetensors#format). The library aligns to 8 bytes only.
Codes that a CPU loads 64 bytes at a time then take two lines for each load, and the trellis kernel
runs at two thirds of its speed (docs/log.md#aligned-tensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moepress.errors import InputError
from moepress.reading.headers import read_header
from moepress.writing.files import write_atomically

LINE = 64  # bytes of a cache line; what is packed has a multiple of it
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; equal tensors give equal bytes.

    Tensors of whole cache lines come first, so each of them begins at one. The others follow, from
    the largest items to the smallest, so each begins at a multiple of its items.

    Args:
        tensors: contiguous, on any device; views of each other are written each for itself.

    Raises:
        InputError: a tensor has a dtype that safetensors does not have.
        OSError: the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: _place(name, tensors[name]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise InputError(
                f"{name} has the dtype {tensor.dtype}, which safetensors does not have. "
                f"Expected one of {', '.join(sorted(NAMES.values()))}."
            )
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            items = tensors[name].detach().cpu().reshape(-1)
            file.write(items.view(torch.uint8).numpy().data)


def align(path: Path) -> None:
    """Write a safetensors file again, atomically, if a tensor of whole lines begins inside a line.

    Raises:
        FileError: the file is missing or damaged.
        CheckpointError: it cannot be written; the file is as it was.
    """
    header = read_header(path)
    whole = (entry for entry in header.tensors.values() if entry.nbytes % LINE == 0)
    if any(entry.start % LINE for entry in whole):
        tensors = load_file(path)  # mapped
        write_atomically(path, lambda to: write_tensors(to, tensors, header.metadata))


def _place(name: str, tensor: Tensor) -> tuple[bool, int, str]:
    return tensor.nbytes % LINE != 0, -tensor.itemsize, name
