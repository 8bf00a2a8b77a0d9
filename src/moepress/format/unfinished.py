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
from moepress.reading.headers import read_header

AGAIN = "Delete the folder it is in, to do that work again."


def save_unfinished(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a checksum, atomically."""
    save_tensors(path, tensors, tensors_digest(tensors))


def load_unfinished(path: Path) -> dict[str, Tensor]:
    """Read a file of `save_unfinished`.

    Raises:
        FileError: it is missing, damaged or changed.
    """
    try:
        tensors, digest = load_tensors(path), read_about(path)
    except FileError as error:  # its advice is for files that can be copied again
        raise FileError(f"{path} is missing, cut or damaged. {AGAIN}") from error
    if digest != tensors_digest(tensors):
        raise FileError(
            f"{path} is not as it was written: its tensors have another checksum, or an older "
            f"moepress wrote it. {AGAIN}"
        )
    return tensors


def check_finished(path: Path, delete: Path) -> None:
    """Check that a file of the output, which a stopped run has finished, is still whole.

    Args:
        delete: what the message says to delete.

    Raises:
        FileError: it is cut, or its header is damaged.
    """
    try:
        read_header(path)
    except FileError as error:
        raise FileError(
            f"{path}, which a stopped run has finished, is cut or damaged. Delete {delete} to do "
            "that work again."
        ) from error
