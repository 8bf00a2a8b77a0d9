"""The search for trellis paths on a card (viterbi.cu), through many matrices at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moepress.kernels.cuda.launch import LAUNCHERS, launcher_for, missing

logger = logging.getLogger(__name__)

THREADS = 256
PATHS = 32  # through eight columns of a matrix
BLOCKS = 3  # of threads that a multiprocessor runs at a time, by their registers
CHOICES = 1024 // 4 * THREADS  # words of scratch of a block
SHARED_BYTES = 2 * 8192 + 64 * 4 + 1025 * 4 + 1024 * 2 + 2 * 8 * 4 + 8  # struct Shared


@lru_cache(maxsize=64)
def available(device: torch.device) -> bool:
    """Whether the kernels for rounding run on a device. A warning says why not on a card."""
    if device.type not in LAUNCHERS:
        return False
    reason = missing(device) if device.type == "cuda" else None
    if reason is not None:
        logger.warning("%s rounds trellis codes slowly, without kernels: %s", device, reason)
    return reason is None


def trellis_search(target: Tensor, bits: float) -> Tensor:
    """The search of `rounding.methods.viterbi.search`, for a target on a card."""
    columns = target.float().contiguous()[None]
    branches = torch.empty(columns.shape, dtype=torch.uint8, device=target.device)
    _launch(columns, None, branches, (bits,), 0)
    return branches[0]


def trellis_search_together(
    target: Tensor, feedback: Tensor, branches: Tensor, bits: Sequence[float], first: int
) -> None:
    """Round columns first .. first + 7 of M matrices [K, N] to trellis codes, in place.

    Args:
        target: [M, K, 64 S] float32.
        feedback: [M, K, 64 S] float32, added to the target; overwritten with target - value.
        branches: [M, K, 64 S] uint8; overwritten.
        bits: [M] of the codes.
        first: a multiple of 8.
    """
    _launch(target, feedback, branches, tuple(bits), first)


def _launch(
    target: Tensor, feedback: Tensor | None, branches: Tensor, bits: tuple[float, ...], first: int
) -> None:
    launcher = launcher_for(target.device)
    count, columns, rows = target.shape
    blocks = min(PATHS * count, BLOCKS * launcher.multiprocessors)
    scratch = torch.empty(blocks * CHOICES, dtype=torch.int32, device=target.device)
    widths = _widths(bits, target.device)
    args = [target, feedback, branches, widths, count, columns, rows, first, scratch]
    launcher.launch("moepress_viterbi_search", (blocks, 1, 1), THREADS, SHARED_BYTES, args)


@lru_cache(maxsize=64)
def _widths(bits: tuple[float, ...], device: torch.device) -> Tensor:
    """Twice the bits, [M] int32."""
    return torch.tensor([round(2 * b) for b in bits], dtype=torch.int32, device=device)
