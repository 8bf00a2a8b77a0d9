"""GPTQ: columns are rounded left to right, and each makes up for the errors of those before it.

hessian.py shows that the squared output error is sum_k D_k || (E R)_k ||^2 with E = W - What and

    (E R)_k = (w_k + sum_(j<k) E_j R_jk) - what_k = adjusted_k - what_k .

`adjusted_k` is known once the columns before k are rounded, so rounding *it* to the nearest grid
point is the best choice for term k. This is the rule of GPTQ (arXiv:2210.17323, eq. 2-3), written
there through the inverse of H as OBQ's update of all remaining weights, and called LDLQ in QuIP
(arXiv:2307.13304, theorem 6 proves them equal). The loss is exactly sum_k D_k ||residual_k||^2.

Order of work. Errors of the left half of the columns reach the right half in one matrix product;
each half does the same inside itself, down to a few columns that are done one by one:

    sweep(left); buffer[right] += R[left, right]^T buffer[left]; sweep(right)

All flops but a sliver are in large products, at any size of cache. The buffer is columns first
[K, n]: what column k holds is feedback until it is rounded, and its error afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moepress.format.codec import Codec
from moepress.rounding.hessian import Factor
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

COLUMNS_BY_HAND = 16  # below this a product costs more than it saves
RELEASED_BLOCK = 128


def quantize_gptq(weight: Tensor, codec: Codec, factor: Factor) -> QuantizedMatrix:
    """Rounds a weight matrix [N, K] with error feedback, on grids searched when a group is reached.

    A grid is judged on the adjusted weights of its group, each column's error weighted by D_k.
    """

    def choose(block: Tensor, curvature: Tensor) -> Grid:
        return search(block, codec, curvature)

    return _with_feedback(weight, codec, factor, choose)


def quantize_gptq_released(weight: Tensor, codec: Codec, factor: Factor) -> QuantizedMatrix:
    """The GPTQ that was published with MC (arXiv:2410.06270), kept for comparison only.

    Min-max grids (mean magnitude at 1 bit), and at 3 bits and below no feedback between the columns
    of a block of 128: its code skips that update `if self.wbits > 3`. Feedback to later blocks is
    computed as if the columns of the block had received theirs.
    """
    basic = mean_magnitude if codec.bits == 1 else min_max
    if codec.bits > 3:
        return _with_feedback(weight, codec, factor, lambda block, _: basic(block, codec))
    return _without_inner_feedback(weight, codec, factor, lambda block: basic(block, codec))


def _with_feedback(
    weight: Tensor, codec: Codec, factor: Factor, choose: Callable[[Tensor, Tensor], Grid]
) -> QuantizedMatrix:
    size = codec.group_size

    def rounder(rows: Tensor, out: Output) -> None:
        buffer = _empty_buffer(rows)  # [K, n]

        def round_group(start: int, stop: int) -> None:
            block = columns_first(rows, start, stop)
            inner = factor.feedback[start:stop, start:stop]
            adjusted = block + buffer[start:stop]
            grid = choose(adjusted, factor.curvature[start:stop])
            codes, residual = _round_columns(block, adjusted, inner, grid, codec)
            out.put(start // size, codes, grid)
            torch.mul(residual, grid.scale, out=buffer[start:stop])

        sweep(buffer, factor.feedback, 0, rows.shape[1], size, round_group)

    return in_row_chunks(weight, codec, rounder)


def _round_columns(
    block: Tensor, adjusted: Tensor, feedback: Tensor, grid: Grid, codec: Codec
) -> tuple[Tensor, Tensor]:
    """Rounds the columns of a group one after the other.

    Args:
        block: [B, n], original weights.
        adjusted: [B, n], the same plus the feedback of all groups before.
        feedback: [B, B], R inside the group.

    Returns:
        Codes and errors of the original weights in code units, both [B, n] float32.
    """
    target = grid.positions(block)
    buffer = grid.positions(adjusted)  # code units: position until rounded, error afterwards
    codes = torch.empty_like(buffer)
    weights = feedback.T.contiguous()  # row k: what column k receives

    def round_few(start: int, stop: int) -> None:
        for k in range(start, stop):
            if k > start:
                buffer[k].addmv_(buffer[start:k].T, weights[k, start:k])
            torch.clamp(buffer[k], 0, codec.levels, out=codes[k]).round_()
            torch.sub(target[k], codes[k], out=buffer[k])

    sweep(buffer, feedback, 0, len(buffer), COLUMNS_BY_HAND, round_few)
    return codes, buffer


def _without_inner_feedback(
    weight: Tensor, codec: Codec, factor: Factor, choose: Callable[[Tensor], Grid]
) -> QuantizedMatrix:
    """Rounding as released. Within this frame of errors that flow through R it reads as follows.

    The released code rounds a block b at the weights adjusted by the blocks before it, and passes
    on residual_b R^-1, as correct GPTQ does. Let y be what it passes on in total: y_b is defined by
    (y R)_b = residual_b, that is y_b = (residual_b - y_(<b) R_(<b,b)) R_bb^-1, and block b was
    adjusted by y_(<b) R_(<b,b) R_bb^-1. With feedback inside the block y would be W - What.
    """
    size = codec.group_size

    def rounder(rows: Tensor, out: Output) -> None:
        buffer = _empty_buffer(rows)

        def round_block(start: int, stop: int) -> None:
            inner = factor.feedback[start:stop, start:stop].T
            passed = torch.linalg.solve_triangular(
                inner, buffer[start:stop], upper=False, unitriangular=True
            )
            adjusted = columns_first(rows, start, stop) + passed
            residual = torch.empty_like(adjusted)
            for first in range(0, stop - start, size):
                part = adjusted[first : first + size]
                grid = choose(part)
                codes = grid.positions(part).clamp_(0, codec.levels).round_()
                out.put((start + first) // size, codes, grid)
                residual[first : first + size] = part - grid.scale * (codes - grid.zero)
            buffer[start:stop] = (
                torch.linalg.solve_triangular(inner, residual, upper=False, unitriangular=True)
                - passed
            )

        sweep(buffer, factor.feedback, 0, rows.shape[1], RELEASED_BLOCK, round_block)

    return in_row_chunks(weight, codec, rounder)


def _empty_buffer(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[1], rows.shape[0], dtype=torch.float32, device=rows.device)


def sweep(
    buffer: Tensor,
    feedback: Tensor,
    start: int,
    stop: int,
    leaf: int,
    visit: Callable[[int, int], None],
) -> None:
    """Visits columns start .. stop in order, `leaf` at a time, with feedback between the visits.

    Before columns k are visited, buffer[k] has received sum_j feedback[j, k] * buffer[j] over all
    columns j in start .. stop that were visited before them.
    """
    leaves = -(-(stop - start) // leaf)
    if leaves <= 1:
        visit(start, stop)
        return
    middle = start + leaf * (leaves // 2)
    sweep(buffer, feedback, start, middle, leaf, visit)
    buffer[middle:stop].addmm_(feedback[start:middle, middle:stop].T, buffer[start:middle])
    sweep(buffer, feedback, middle, stop, leaf, visit)
