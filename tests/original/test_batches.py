"""Storage for arrays of all tokens: large ones are mapped files, whose bytes exist."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from moepress.errors import CheckpointError
from moepress.original import batches


@pytest.mark.parametrize("function", ["posix_fallocate", "write"])
def test_a_mapped_array_has_its_bytes_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """By posix_fallocate; where there is none, as on macOS, they are written."""
    if function == "write":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, function):
        pytest.skip("not here")
    monkeypatch.setattr(batches, "IN_MEMORY", 0)
    found = batches.empty((3, 5), torch.float32)
    found.fill_(2.0)
    assert found.shape == (3, 5) and found.sum() == 30

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(CheckpointError, match="no room for a temporary file of 60 bytes"):
        batches.empty((3, 5), torch.float32)


def test_zeros_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batches, "PIECE", 8)
    with (tmp_path / "file").open("wb") as file:
        batches._write_zeros(file.fileno(), 60)
    assert (tmp_path / "file").read_bytes() == bytes(60)
