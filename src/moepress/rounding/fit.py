"""The best scale of each row of a rounded matrix, from what feedback has left of it.

Codes c of weights w, both in units of the scale so far, should be multiplied by

    <w, c>_H / <c, c>_H,     H = R D R^T (hessian.py),     c = w - E.

So w R and E R are needed. With feedback (methods/trellis.py) a column block B leaves
r_B = (E V)_B, and V_JB = R_JB R_BB^(-1). Hence (E R)_B = r_B R_BB, which costs almost nothing, and
one product with the triangular R is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from moepress.kernels import cpu
from moepress.kernels.trellis import TILE_COLUMNS
from moepress.rounding.factor import COLUMNS_PER_SLICE, Factor
from moepress.rounding.hessian import tensor_cores


def best_scale(
    rows: Tensor,
    scale: Tensor,
    residual: Tensor,
    factor: Factor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The best scale of each row for its codes, [N] float32.

    Args:
        rows: [N, K] float32 weights.
        scale: [N] float32, of the codes so far; kept where it is 0 or all codes have the value 0.
        residual: [K, N] r, columns first, in units of `scale`. Without feedback it is E.
        factor: of the Hessian; None: all inputs alike, and no feedback.
        dtype: float32 or bfloat16, of the factors of the product with R.
    """
    per_scale = inverse(scale)
    if factor is None:
        slices: Iterable[Tensor] = torch.split(rows.T, COLUMNS_PER_SLICE)
    else:
        slices = factor.products(rows.T, dtype)
    product, energy = _sums(slices, residual, factor, per_scale)
    return torch.where((scale > 0) & (energy > 0), scale * product / energy, scale)


def gain(weighted: Sequence[Tensor], residual: Tensor, factor: Factor) -> Tensor:
    """<w, c>_H / <c, c>_H of each row, [N] float32, for c = w - E; 1 where <c, c>_H is 0.

    Args:
        weighted: R^T w [K, N], float32 or bfloat16, some rows each.
        residual: [K, N] r = E V.
        factor: of the Hessian.
    """
    return _ratio(*_sums(weighted, residual, factor))


def _ratio(product: Tensor, energy: Tensor) -> Tensor:
    return torch.where(energy > 0, product / energy, 1.0)


def mean_gain(
    weighted: Sequence[Tensor], residual: Tensor, factor: Factor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean g of `gain` over rows, and what of the error with g is left with each row's own.

    Args:
        size: [N], root mean square of each row.

    Returns:
        g, and the ratio of root mean squared errors, at most 1: numbers; 1 where all rows are 0.
    """
    product, energy = _sums(weighted, residual, factor)
    own = torch.zeros_like(product)  # <w, w>_H
    start = 0
    for some in weighted:
        own += factor.curvature[start : start + len(some)] @ some.float().square()
        start += len(some)
    of_row = _ratio(product, energy)
    mean, share = of_row.mean(), size.square()
    best = share @ (own - of_row * product)
    with_mean = share @ (own - 2 * mean * product + mean.square() * energy)
    return mean, torch.where(with_mean > 0, best / with_mean, 1.0).clamp(0, 1).sqrt()


def _sums(
    weighted: Iterable[Tensor],
    residual: Tensor,
    factor: Factor | None,
    per_scale: Tensor | None = None,
) -> Tensor:
    """`plain_sums`; on a CPU in the order of the columns, compiled or not."""
    if factor is None or residual.device.type != "cpu":
        return plain_sums(weighted, residual, factor, per_scale)
    add = add_in_order if cpu.missing() is not None else cpu.trellis_fit
    return _summed(add, weighted, residual, factor, per_scale)


def plain_sums(
    weighted: Iterable[Tensor],
    residual: Tensor,
    factor: Factor | None,
    per_scale: Tensor | None = None,
) -> Tensor:
    """<w, c>_H and <c, c>_H of each row, [2, N] float32, summed over slices of columns.

    Args:
        weighted: R^T w [K, N], float32 or bfloat16, some rows at a time.
        residual: [K, N] r = E V.
        factor: None: H = I.
        per_scale: [N] float32, factors of w; None: 1.
    """
    return _summed(add_products, weighted, residual, factor, per_scale)


def _summed(
    add: Callable[..., None],
    weighted: Iterable[Tensor],
    residual: Tensor,
    factor: Factor | None,
    per_scale: Tensor | None,
) -> Tensor:
    """`plain_sums`, by a function that adds some columns as `add_products` does."""
    sums = residual.new_zeros(2, residual.shape[1])
    residual = residual.contiguous()
    blocks = None if factor is None else factor.diagonal_blocks(TILE_COLUMNS)
    start = 0
    with tensor_cores(residual.device):
        for right in weighted:
            here = slice(start, start + len(right))
            start = here.stop
            if factor is None or blocks is None:
                inside, curvature = None, residual.new_ones(len(right))
            else:
                inside = blocks[here.start // TILE_COLUMNS : here.stop // TILE_COLUMNS]
                curvature = factor.curvature[here]
            add(right, per_scale, residual[here], inside, curvature, sums)
    return sums


def add_products(
    weighted: Tensor,
    per_scale: Tensor | None,
    residual: Tensor,
    blocks: Tensor | None,
    curvature: Tensor,
    sums: Tensor,
) -> None:
    """What `cpu.trellis_fit` adds (its arguments are told there), by products; blocks None: I."""
    w = weighted if per_scale is None else weighted * per_scale
    codes = w - (residual if blocks is None else within_blocks(residual, blocks))
    sums[0] += curvature @ (w * codes)
    sums[1] += curvature @ codes.square_()


def add_in_order(
    weighted: Tensor,
    per_scale: Tensor | None,
    residual: Tensor,
    blocks: Tensor,
    curvature: Tensor,
    sums: Tensor,
) -> None:
    """What `cpu.trellis_fit` adds, with the same floats."""
    w = weighted.float() if per_scale is None else weighted * per_scale
    left = residual.view(-1, TILE_COLUMNS, residual.shape[1])
    errors = torch.zeros_like(left)
    for i in range(TILE_COLUMNS):  # R is upper triangular
        errors[:, i:] += blocks[:, i, i:, None] * left[:, i, None]
    codes = w - errors.view_as(w)
    of_product, of_energy = (curvature[:, None] * x * codes for x in (w, codes))
    added = torch.zeros_like(sums)
    for k in range(len(w)):
        added[0] += of_product[k]
        added[1] += of_energy[k]
    sums += added


def within_blocks(residual: Tensor, blocks: Tensor) -> Tensor:
    """(E R)^T from r, [K, N]: every column block times its diagonal block of R.

    Args:
        residual: [K, N] r = E V.
        blocks: [K / 8, 8, 8] on the diagonal of R.
    """
    by_block = residual.view(-1, TILE_COLUMNS, residual.shape[1])
    return torch.bmm(blocks.mT, by_block).view_as(residual)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, or 0 where the scale is 0."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, 0.0)
