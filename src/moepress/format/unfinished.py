"""Tensors of unfinished work: read back as they were written, or not at all.

Each file keeps a SHA-256 of its tensors, so that a damaged one cannot change the model that a
stopped run goes on to make.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moepress.errors import FileError
from moepress.format.checkpoint import load_tensors, read_about, save_tensors


def save_unfinished(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a checksum, atomically."""
    save_tensors(path, tensors, _digest(tensors))


def load_unfinished(path: Path) -> dict[str, Tensor]:
    """Read a file of `save_unfinished`.

    Raises:
        FileError: it is missing, damaged or changed.
    """
    tensors = load_tensors(path)
    if read_about(path) != _digest(tensors):
        raise FileError(
            f"{path} is not as it was written: its tensors have another checksum. Delete the "
            "folder it is in, to do that work again."
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
