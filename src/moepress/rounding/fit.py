"""The best scale of each row of a rounded matrix, from what feedback has left of it.

Codes c of weights w, both in units of the scale so far, should be multiplied by

    <w, c>_H / <c, c>_H,     H = R D R^T (hessian.py),     c = w - E.

So w R and E R are needed. With feedback (methods/trellis.py) a column block B leaves
r_B = (E V)_B, and V_JB = R_JB R_BB^(-1). Hence (E R)_B = r_B R_BB, which costs almost nothing, and
one product with the triangular R is left.
"""

from __future__ import annotations

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
    product, energy = torch.zeros_like(scale), torch.zeros_like(scale)
    for start in range(0, rows.shape[1], COLUMNS_PER_SLICE):
        here = slice(start, min(start + COLUMNS_PER_SLICE, rows.shape[1]))
        if factor is None:
            weighted, errors = rows[:, here].T * per_scale, residual[here]
            curvature = torch.ones_like(rows[0, here])
        else:
            with tensor_cores(rows.device):
                weighted = _upper_product(rows.T, factor.feedback, here).mul_(per_scale)
                errors = within_blocks(residual[here], factor.feedback[here, here])
            curvature = factor.curvature[here]
        for total, part in zip(
            (product, energy), _products(weighted, errors, curvature), strict=True
        ):
            total += part
    return torch.where((scale > 0) & (energy > 0), scale * product / energy, scale)


def gain(weighted: Tensor, errors: Tensor, curvature: Tensor) -> Tensor:
    """<w, c>_H / <c, c>_H of each row, [N] float32, for c = w - E; 1 where <c, c>_H is 0.

    Args:
        weighted: [K, N] R^T w.
        errors: [K, N] R^T E.
        curvature: [K] D.
    """
    product, energy = _products(weighted, errors, curvature)
    return torch.where(energy > 0, product / energy, 1.0)


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


def _products(weighted: Tensor, errors: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """<w, c>_H and <c, c>_H of each row, both [N]; arguments as of `gain`."""
    codes = weighted - errors
    return curvature @ (weighted * codes), curvature @ codes.square()
