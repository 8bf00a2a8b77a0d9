"""Tensors of unfinished work: read back as they were written, or not at all.

Each file keeps a SHA-256 of its tensors, so that a damaged one cannot change the model that a
stopped run goes on to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moepress.errors import FileError
from moepress.format.checkpoint import load_tensors, read_about, save_tensors
from moepress.format.digest import tensors_digest


def save_unfinished(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a checksum, atomically."""
    save_tensors(path, tensors, tensors_digest(tensors))


def load_unfinished(path: Path) -> dict[str, Tensor]:
    """Read a file of `save_unfinished`.

    Raises:
        FileError: it is missing, damaged or changed.
    """
    tensors = load_tensors(path)
    if read_about(path) != tensors_digest(tensors):
        raise FileError(
            f"{path} is not as it was written: its tensors have another checksum, or an older "
            "moepress wrote it. Delete the folder it is in, to do that work again."
        )
    return tensors
