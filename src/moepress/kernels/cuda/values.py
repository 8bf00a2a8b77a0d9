"""The values that branches of trellis codes choose, on a card (values.cu): one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.format.codec import ROWS_PER_BLOCK, ROWS_PER_SLAB
from moepress.kernels.cuda.launch import Argument, aligned, launcher_for
from moepress.kernels.trellis import (
    BYTES_SUMMED,
    CENTERS,
    MULTIPLIERS,
    TILE_COLUMNS,
    branch_bits,
    value_bits,
)

THREADS = 128


def code_matrix(branches: Tensor, bits: float) -> Tensor:
    """`code_matrix` of kernels/trellis.py for branches [64 S, K] uint8 on a card: equal values."""
    branches = aligned(branches)
    rows, columns = branches.shape
    out = torch.empty(rows, columns, dtype=torch.float32, device=branches.device)
    if not out.numel():
        return out
    codes: list[int] = []
    for width, each in zip(branch_bits(bits), value_bits(bits), strict=True):
        summed = (1 << 8 * BYTES_SUMMED[each]) - 1
        codes += [width, MULTIPLIERS[each], summed, CENTERS[each]]
    grid = -(-columns // (TILE_COLUMNS * THREADS)), ROWS_PER_BLOCK, rows // ROWS_PER_SLAB
    args: list[Argument] = [branches, rows, columns, *codes, out]
    launcher_for(branches.device).launch("moepress_values", grid, THREADS, 0, args)
    return out
