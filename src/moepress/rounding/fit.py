"""The best scale of each row of a rounded matrix, from what feedback has left of it.

Codes c of weights w, both in units of the scale so far, should be multiplied by

    <w, c>_H / <c, c>_H,     H = R D R^T (hessian.py),     c = w - E.

So w R and E R are needed. With feedback (methods/trellis.py) a column block B leaves
r_B = (E V)_B, and V_JB = R_JB R_BB^(-1). Hence (E R)_B = r_B R_BB, which costs almost nothing, and
one product with the triangular R is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moepress.kernels.trellis import TILE_COLUMNS
from moepress.rounding.hessian import COLUMNS_PER_SLICE, Factor, tensor_cores


def best_scale(rows: Tensor, scale: Tensor, residual: Tensor, factor: Factor | None) -> Tensor:
    """The best scale of each row for its codes, [N] float32.

    Args:
        rows: [N, K] float32 weights.
        scale: [N] float32, of the codes so far; kept where it is 0 or all codes have the value 0.
        residual: [K, N] r, columns first, in units of `scale`. Without feedback it is E.
        factor: of the Hessian; None: all inputs alike, and no feedback.
    """
    per_scale = inverse(scale)

    def weighted(here: slice) -> Tensor:
        columns = (
            rows[:, here].T if factor is None else _upper_product(rows.T, factor.feedback, here)
        )
        return columns * per_scale

    product, energy = _products(weighted, residual, factor)
    return torch.where((scale > 0) & (energy > 0), scale * product / energy, scale)


def gain(weighted: Tensor, residual: Tensor, factor: Factor) -> Tensor:
    """<w, c>_H / <c, c>_H of each row, [N] float32, for c = w - E; 1 where <c, c>_H is 0.

    Args:
        weighted: [K, N] R^T w, float32 or bfloat16.
        residual: [K, N] r = E V.
        factor: of the Hessian.
    """
    product, energy = _products(lambda here: weighted[here], residual, factor)
    return torch.where(energy > 0, product / energy, 1.0)


def _products(
    weighted: Callable[[slice], Tensor], residual: Tensor, factor: Factor | None
) -> tuple[Tensor, Tensor]:
    """<w, c>_H and <c, c>_H of each row, both [N], summed over slices of columns.

    Args:
        weighted: gives rows of R^T w [K, N].
        residual: [K, N] r = E V.
        factor: None: H = I.
    """
    product, energy = residual.new_zeros(2, residual.shape[1])
    for start in range(0, len(residual), COLUMNS_PER_SLICE):
        here = slice(start, min(start + COLUMNS_PER_SLICE, len(residual)))
        with tensor_cores(residual.device):
            right = weighted(here)
            if factor is None:
                errors, curvature = residual[here], residual.new_ones(here.stop - start)
            else:
                errors = within_blocks(residual[here], factor.feedback[here, here])
                curvature = factor.curvature[here]
        codes = right - errors
        product += curvature @ (right * codes)
        energy += curvature @ codes.square_()
    return product, energy


def upper_product(columns: Tensor, upper: Tensor) -> Tensor:
    """R^T w, [K, N]: the product w R with the upper triangular R, columns first.

    Args:
        columns: [K, N].
        upper: [K, K].
    """
    result = columns.new_empty(columns.shape)
    for start in range(0, len(columns), COLUMNS_PER_SLICE):
        here = slice(start, min(start + COLUMNS_PER_SLICE, len(columns)))
        result[here] = _upper_product(columns, upper, here)
    return result


def within_blocks(residual: Tensor, feedback: Tensor) -> Tensor:
    """(E R)^T from r, [K, N]: every column block times its diagonal block of R.

    Args:
        residual: [K, N] r = E V.
        feedback: [K, K] R.
    """
    size = TILE_COLUMNS
    blocks = feedback.unfold(0, size, size).unfold(1, size, size)  # [K / 8, K / 8, 8, 8]
    diagonal = blocks.diagonal().permute(2, 1, 0)  # [K / 8, 8, 8], transposed
    return torch.bmm(diagonal, residual.view(-1, size, residual.shape[1])).view_as(residual)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, or 0 where the scale is 0."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, 0.0)


def _upper_product(columns: Tensor, upper: Tensor, here: slice) -> Tensor:
    """The rows `here` of `upper_product`."""
    return torch.mm(upper[: here.stop, here].T, columns[: here.stop])
