"""Round to nearest: every weight goes to the nearest point of its group's grid, no calibration.

The grid is searched (grid.py). On a trained model that halves the loss of a min-max grid at equal
bytes, so this is a fair baseline.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moepress.format.codec import Codec
from moepress.rounding.methods.grid import (
    Grid,
    Output,
    QuantizedMatrix,
    columns_first,
    in_row_chunks,
    search,
)


def quantize_rtn(weight: Tensor, codec: Codec) -> QuantizedMatrix:
    """Round a weight matrix [N, K] to nearest on searched grids."""
    return round_to_nearest(weight, codec, _searched)


def round_to_nearest(
    weight: Tensor, codec: Codec, choose: Callable[[Tensor, Codec], Grid]
) -> QuantizedMatrix:
    """Round a weight matrix [N, K] to nearest on the grids that `choose` finds for its groups."""

    def rounder(rows: Tensor, out: Output) -> None:
        for group in range(codec.groups(rows.shape[1])):
            start = group * codec.group_size
            weights = columns_first(rows, start, start + codec.group_size)
            grid = choose(weights, codec)
            out.put(group, grid.positions(weights).clamp_(0, codec.levels).round_(), grid)

    return in_row_chunks(weight, codec, rounder)


def _searched(group: Tensor, codec: Codec) -> Grid:
    return search(group, codec, torch.ones(len(group), device=group.device))
