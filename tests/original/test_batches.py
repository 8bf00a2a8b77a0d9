"""Storage for arrays of all tokens: large ones are mapped files, whose bytes exist."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from moepress.errors import CheckpointError
from moepress.original import batches


def test_a_mapped_array_has_its_bytes_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "IN_MEMORY", 0)
    found = batches.empty((3, 5), torch.float32)
    found.fill_(2.0)
    assert found.shape == (3, 5) and found.sum() == 30

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="no room for a temporary file of 60 bytes"):
        batches.empty((3, 5), torch.float32)
