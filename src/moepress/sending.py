"""Copies from the host's memory to a card, which nothing waits for.

`Tensor.to` returns when a card has done everything that it was given before the copy. Work for it
that Python prepares meanwhile would come late: the card stands still. Here the copy takes its place
among the other work. CUDA itself keeps what it copies of memory that is not pinned; pinned memory
must not be written before the copy is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. Copies to a card are not waited for, all others are."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def rows_sent(array: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """The rows [t] int64 of an array [T, ...], on a device."""
    return sent(array[sent(rows, array.device)], device)
