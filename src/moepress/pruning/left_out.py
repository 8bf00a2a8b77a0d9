"""Choices of experts that are left out: they are found by a table.

`torch.isin` of many experts waits for a card, which the capture of a CUDA graph does not allow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_out_table(left_out: Sequence[int], experts: int) -> Tensor:
    """[E + 2] bool, whether an expert is left out; the last two are no experts. Empty: none is."""
    table = torch.zeros(experts + 2 if left_out else 0, dtype=torch.bool, device="cpu")
    table[list(left_out)] = True
    return table


def without_left_out(index: Tensor, table: Tensor, none: int) -> Tensor:
    """Choices [T, k] int64, from -1 to E, with `none` in place of experts that are left out.

    Args:
        table: of `left_out_table`, on the device of `index`.
        none: what a choice of no expert is: -1 or E.
    """
    if not len(table):
        return index
    return index.masked_fill(table[index.clamp(-1, len(table) - 2)], none)
