"""The rotation of kernels/trellis.py on a card (rotation.cu): one pass over the array."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moepress.kernels.cuda.launch import DTYPES, Argument, launcher_for
from moepress.kernels.trellis import run_length, signs

THREADS = 256
SPAN = 2048  # numbers of a block: whole runs


def takes(x: Tensor) -> bool:
    """Whether the kernel can rotate an array on a card."""
    return x.dtype in DTYPES and x.numel() > 0


def rotate(x: Tensor, back: bool = False) -> Tensor:
    """`rotate` of kernels/trellis.py, or its `rotate_back`: equal results.

    Args:
        x: [..., K] that the kernel `takes`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    run = run_length(columns)
    blocks = -(-x.numel() // SPAN)
    args: list[Argument] = [
        x, out, _signs(columns, x.device), DTYPES[x.dtype], x.numel(), columns,
        run.bit_length() - 1, SPAN, int(back), float(run**-0.5),
    ]  # fmt: skip
    launcher = launcher_for(x.device)
    launcher.launch("moepress_rotation", (blocks, 1, 1), THREADS, 4 * (SPAN + SPAN // 32), args)
    return out


@lru_cache(maxsize=32)
def _signs(columns: int, device: torch.device) -> Tensor:
    return signs(columns).to(device)
