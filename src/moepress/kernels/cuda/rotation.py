"""The rotation of kernels/trellis.py on a card (rotation.cu): one pass over the array."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moepress.kernels.cuda.launch import Argument, launcher_for
from moepress.kernels.trellis import run_length, signs

THREADS = 256
SPAN = 2048  # numbers of a block, if the runs are not longer
LONGEST = 1 << 15  # run that fits into the shared memory of every card but those of sm_86 and 89
KINDS = (torch.float32, torch.float16, torch.bfloat16)


def takes(x: Tensor) -> bool:
    """Whether the kernel can rotate an array on a card."""
    return x.dtype in KINDS and x.numel() > 0 and run_length(x.shape[-1]) <= LONGEST // 2


def rotate(x: Tensor, back: bool = False) -> Tensor:
    """`rotate` of kernels/trellis.py, or its `rotate_back`: equal results.

    Args:
        x: [..., K] that the kernel `takes`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    run = run_length(columns)
    span = max(run, SPAN)
    blocks = -(-x.numel() // span)
    args: list[Argument] = [
        x, out, _signs(columns, x.device), KINDS.index(x.dtype), x.numel(), columns,
        run.bit_length() - 1, span, int(back), float(run**-0.5),
    ]  # fmt: skip
    launcher = launcher_for(x.device)
    launcher.launch("moepress_rotation", (blocks, 1, 1), THREADS, 4 * (span + span // 32), args)
    return out


@lru_cache(maxsize=32)
def _signs(columns: int, device: torch.device) -> Tensor:
    return signs(columns).to(device)
