"""GPTQ: columns are rounded left to right, and each one compensates for the errors before it.

hessian.py shows that the squared output error is sum_k D_k || (E R)_k ||^2 with E = W - Ŵ and

    (E R)_k = (w_k + sum_(j<k) E_j R_jk) - ŵ_k = adjusted_k - ŵ_k .

`adjusted_k` depends only on the columns before k, so once these are rounded, the nearest grid point
to `adjusted_k` is the best choice for term k. This is the rule of GPTQ (arXiv:2210.17323, eq. 2-3),
which writes it with the inverse of H as OBQ's update of all remaining weights. QuIP calls it LDLQ
(arXiv:2307.13304; theorem 6 proves them equal). The squared output error is exactly
sum_k D_k ||residual_k||^2 with residual_k = (E R)_k. sweep.py visits the columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moepress.format.codec import Codec
from moepress.rounding.factor import Factor
from moepress.rounding.methods.grid import (
    Grid,
    Output,
    QuantizedMatrix,
    columns_first,
    in_row_chunks,
    mean_magnitude,
    min_max,
    search,
)
from moepress.rounding.sweep import sweep

COLUMNS_ONE_BY_ONE = 16  # for fewer columns a matrix product costs more than it saves
RELEASED_BLOCK = 128  # columns that the released code rounds together: a released block


def quantize_gptq(weight: Tensor, codec: Codec, factor: Factor) -> QuantizedMatrix:
    """Round a weight matrix [N, K] with error feedback, on searched grids.

    The grid of a group is searched when the sweep reaches the group: on its adjusted weights, with
    the error of column k weighted by D_k.
    """

    def choose(group: Tensor, curvature: Tensor) -> Grid:
        return search(group, codec, curvature)

    return _with_feedback(weight, codec, factor, choose)


def quantize_gptq_released(weight: Tensor, codec: Codec, factor: Factor) -> QuantizedMatrix:
    """Round a weight matrix [N, K] with the GPTQ of MC's released code (arXiv:2410.06270).

    For comparison only. Grids are min-max, or mean magnitude at 1 bit. At 3 bits and below the
    128 columns of a released block get no feedback from each other: the released code makes that
    update only `if self.wbits > 3`. Its feedback to later blocks is computed as if they had got
    that feedback.
    """
    basic = mean_magnitude if codec.bits == 1 else min_max
    if codec.bits > 3:
        return _with_feedback(weight, codec, factor, lambda group, _: basic(group, codec))
    return _without_inner_feedback(weight, codec, factor, lambda group: basic(group, codec))


def _with_feedback(
    weight: Tensor, codec: Codec, factor: Factor, choose: Callable[[Tensor, Tensor], Grid]
) -> QuantizedMatrix:
    size = codec.group_size
    blocks, feedback = factor.diagonal_blocks(size), factor.by_column()

    def rounder(rows: Tensor, out: Output) -> None:
        buffer = _empty_buffer(rows)  # [K, n]

        def round_group(start: int, stop: int) -> None:
            group = columns_first(rows, start, stop)
            inner = blocks[start // size]
            adjusted = group + buffer[start:stop]
            grid = choose(adjusted, factor.curvature[start:stop])
            codes, residual = _round_columns(group, adjusted, inner, grid, codec)
            out.put(start // size, codes, grid)
            torch.mul(residual, grid.scale, out=buffer[start:stop])

        sweep(buffer, feedback, 0, rows.shape[1], size, round_group)

    return in_row_chunks(weight, codec, rounder)


def _round_columns(
    group: Tensor, adjusted: Tensor, feedback: Tensor, grid: Grid, codec: Codec
) -> tuple[Tensor, Tensor]:
    """Round the columns of a group one after the other.

    Args:
        group: [B, n], original weights of the group, columns first.
        adjusted: [B, n], the same plus the feedback of all groups before.
        feedback: [B, B], R inside the group.

    Returns:
        Codes, and errors of the original weights in code units, both [B, n] float32.
    """
    target = grid.positions(group)
    buffer = grid.positions(adjusted)  # code units: position until rounded, error afterwards
    codes = torch.empty_like(buffer)
    received = feedback.T.contiguous()  # row k: weights of the feedback that column k receives

    def round_few(start: int, stop: int) -> None:
        for k in range(start, stop):
            if k > start:
                buffer[k].addmv_(buffer[start:k].T, received[k, start:k])
            torch.clamp(buffer[k], 0, codec.levels, out=codes[k]).round_()
            torch.sub(target[k], codes[k], out=buffer[k])

    sweep(buffer, feedback, 0, len(buffer), COLUMNS_ONE_BY_ONE, round_few)
    return codes, buffer


def _without_inner_feedback(
    weight: Tensor, codec: Codec, factor: Factor, choose: Callable[[Tensor], Grid]
) -> QuantizedMatrix:
    """Round as the released code does, rewritten in terms of R instead of the inverse of H.

    The released code rounds released block b after adjusting it for the blocks before b. It then
    passes residual_b R^-1 on to the later blocks, as correct GPTQ does. Let y be the sum of all
    that is passed on. It satisfies (y R)_b = residual_b, that is

        y_b = (residual_b - y_(<b) R_(<b,b)) R_bb^-1,

    and block b was adjusted by y_(<b) R_(<b,b) R_bb^-1. With feedback inside the blocks y would be
    W - Ŵ. The buffer holds y_(<b) R_(<b,b) until block b is rounded, and y_b afterwards.
    """
    size, feedback = codec.group_size, factor.dense()

    def rounder(rows: Tensor, out: Output) -> None:
        buffer = _empty_buffer(rows)

        def round_block(start: int, stop: int) -> None:
            inner = feedback[start:stop, start:stop].T
            adjustment = torch.linalg.solve_triangular(
                inner, buffer[start:stop], upper=False, unitriangular=True
            )
            adjusted = columns_first(rows, start, stop) + adjustment
            residual = torch.empty_like(adjusted)
            for first in range(0, stop - start, size):
                group = adjusted[first : first + size]
                grid = choose(group)
                codes = grid.positions(group).clamp_(0, codec.levels).round_()
                out.put((start + first) // size, codes, grid)
                residual[first : first + size] = group - grid.scale * (codes - grid.zero)
            buffer[start:stop] = (
                torch.linalg.solve_triangular(inner, residual, upper=False, unitriangular=True)
                - adjustment
            )

        sweep(buffer, feedback, 0, rows.shape[1], RELEASED_BLOCK, round_block)

    return in_row_chunks(weight, codec, rounder)


def _empty_buffer(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[1], rows.shape[0], dtype=torch.float32, device=rows.device)
