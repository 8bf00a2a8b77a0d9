"""Memory of the machine that a card copies from and to fast: pinned, never swapped out."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.memory import free_host_memory

SHARE_PINNED = 0.1  # of the machine's free memory, that an array which a card uses may take


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """An uninitialised tensor in memory that a card reads fast; None: there is too little of it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if pinned_bytes(size) > SHARE_PINNED * free_host_memory():
        return None
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def pinned_bytes(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes if it is pinned: torch takes powers of two."""
    return 1 << max(0, size - 1).bit_length()
