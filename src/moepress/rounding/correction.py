"""Weights that make up for the rounding errors of earlier layers.

When a layer is rounded, the layers before it are rounded already. So its inputs x'_t differ from
the inputs x_t that the original model has for the same tokens. Rounding W itself approximates
W x'_t, but W x_t is wanted. The linear map of x'_t that comes nearest to W x_t (least squares,
token weights c_t) is

    W* = W + W M H^-1,     M = sum_t c_t (x_t - x'_t) x'_t^T,     H = sum_t c_t x'_t x'_t^T

and sum_t c_t || W x_t - Ŵ x'_t ||^2 = trace((W* - Ŵ) H (W* - Ŵ)^T) + a term without Ŵ.
So it suffices to round W* with the Hessian of x'. GPTAQ (arXiv:2504.02692) and QEP
(arXiv:2504.09629) correct weights in this way.

Over-fitting. M also contains noise of the T tokens it was measured on, and W* can fit some of that
noise with each of its K inputs. Therefore the damping of H is at least K / T of its mean diagonal
(ridge regression with signal and noise of equal size), and only a share of the correction is
applied: W + strength * W M H^-1 (docs/log.md#correction).

With H = R D R^T (hessian.py), two triangular solves give W M H^-1: of W M, or of M alone where W
has more rows than columns (gate and up). If the inputs belong to a single matrix of few rows,
N <= K / 2 (often `down`), W M itself is summed, from W (x_t - x'_t). That takes 4 T N K operations
in place of 2 T K^2 + 2 N K^2, and N K numbers in place of K^2. The gain, which needs W M again, has
it. Few tokens are kept, and need neither M nor H (kept_tokens.py).

Products of M, W and R may be of bfloat16 numbers (`dtype`): a part in 500 of a correction that is
half noise (docs/log.md#few-tokens). H and its factor are float32.

Gain. A single gain for a whole matrix cannot over-fit, so it is applied in full. Ŵ is multiplied by

    g = sum_t c_t <W x_t, Ŵ x'_t> / sum_t c_t || Ŵ x'_t ||^2
      = (<W, Ŵ>_H + <W M, Ŵ>) / <Ŵ, Ŵ>_H,          <A, B>_H = trace(A H B^T) .

g is above 1 for `down`: rounding to the least squared error takes energy from gate and from up,
and the input of `down` is a product of their outputs (docs/log.md#gain-of-down).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.rounding.factor import DenseFactor, Factor, column_slices
from moepress.rounding.hessian import TOKENS_PER_CHUNK, Hessian, tensor_cores
from moepress.sending import sent


def sums_moved(rows: int, cols: int) -> bool:
    """Whether W M is summed in place of M for a matrix W [rows, cols]."""
    return 2 * rows <= cols


def solves_first(rows: int, cols: int) -> bool:
    """Whether M H^-1 is solved for, and then multiplied by a matrix W [rows, cols]."""
    return rows > cols


class Correction:
    """Accumulates M = sum_t c_t (x_t - x'_t) x'_t^T, or W M, in float32. Holds one such matrix.

    Args:
        features: K.
        weight: [N, K] float32, the only matrix to correct: W M is summed. None: M is, for any
            matrices.
    """

    def __init__(
        self, features: int, device: torch.device | str, weight: Tensor | None = None
    ) -> None:
        self._weight = weight
        rows = features if weight is None else len(weight)
        self._sum = torch.zeros(rows, features, dtype=torch.float32, device=device)

    def add(
        self,
        x: Tensor,
        original: Tensor,
        weight: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        slices: Sequence[slice] | None = None,
    ) -> None:
        """Add T tokens.

        Args:
            x: [T, K], any float dtype: x', the layer's inputs once earlier layers are rounded.
            original: [T, K], any float dtype: its inputs in the original model, token by token.
            weight: [T], at least 0: weight c_t of each token; None: 1.
            dtype: float32 or bfloat16, of the factors of products.
            slices: those of `column_slices` of M that are summed; None: all.
        """
        weight = torch.ones(len(x)) if weight is None else weight
        for start in range(0, len(x), TOKENS_PER_CHUNK):
            chunk = slice(start, start + TOKENS_PER_CHUNK)
            now = x[chunk].detach().to(self._sum)
            difference = original[chunk].detach().to(self._sum) - now
            difference *= sent(weight[chunk], difference.device).float()[:, None]
            with tensor_cores(now.device):
                difference = difference.to(dtype)
                if self._weight is not None:
                    difference = difference @ self._weight.to(dtype).T
                now = now.to(dtype)
                for own in column_slices(len(self._sum)) if slices is None else slices:
                    if dtype == torch.float32:
                        self._sum[own].addmm_(difference[:, own].T, now)
                    else:
                        self._sum[own] += difference[:, own].T @ now

    def corrected(
        self,
        weight: Tensor,
        hessian: Hessian,
        damping: float,
        strength: float,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """W + strength * W M H^-1, [N, K] float32; W if no token was added.

        Args:
            weight: [N, K], any float dtype.
            hessian: of the same x' and token weights. It is used up: nothing can be added later.
            damping: least damping of the Hessian, in units of the mean of its diagonal.
            strength: 0 (W as it is) to 1 (the full correction).
            dtype: float32 or bfloat16, of the factors of products.

        Raises:
            NumericalError: the Hessian holds NaN or infinity.
        """
        w = weight.float()
        if not hessian.tokens:
            return w
        factor = hessian.factor(max(damping, weight.shape[1] / hessian.tokens))
        if solves_first(*w.shape):
            moved = _product(w, _solved(self._sum, factor, dtype), dtype)
        else:
            moved = _solved(self._moved(w, dtype), factor, dtype)
        return w.add(moved, alpha=strength)

    def rows(self, own: slice) -> Tensor:
        """The rows of a slice of M, not copied."""
        return self._sum[own]

    def gain(
        self,
        weight: Tensor,
        rounded: Tensor,
        factor: Factor,
        dtype: torch.dtype = torch.float32,
    ) -> float:
        """The gain g for which the outputs of g * Ŵ come nearest to the original outputs.

        Args:
            weight: [N, K] W, any float dtype.
            rounded: [N, K] Ŵ, float32.
            factor: of the Hessian of the same x' and token weights. Its damping is subtracted.
            dtype: float32 or bfloat16, of the factors of products.

        Returns:
            g; 1 where the least squares give no g above 0.
        """
        with tensor_cores(weight.device):
            return self._gain(weight.float(), rounded, factor, dtype)

    def _gain(self, w: Tensor, rounded: Tensor, factor: Factor, dtype: torch.dtype) -> float:
        # H = R D R^T - damping * mean * I, and the trace of R D R^T is K * mean * (1 + damping).
        trace = (factor.dense().square() @ factor.curvature).double().sum().item()
        added = trace / w.shape[1] * factor.damping / (1 + factor.damping)
        product = ((self._moved(w, dtype) - added * w) * rounded).double().sum().item()
        energy = -added * rounded.double().square().sum().item()
        start = 0
        slices = factor.products(w.T, dtype), factor.products(rounded.T, dtype)
        for right, left in zip(*slices, strict=True):
            right, left = right.float(), left.float()
            curvature = factor.curvature[start : start + len(left)]
            start += len(left)
            product += (curvature @ (right * left)).double().sum().item()
            energy += (curvature @ left.square_()).double().sum().item()
        return least_squares(product, energy)

    def _moved(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """W M, [N, K] float32."""
        return self._sum if self._weight is not None else _product(w, self._sum, dtype)


def _product(w: Tensor, square: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of [N, K] with [K, K], float32."""
    with tensor_cores(w.device):
        return (w.to(dtype) @ square.to(dtype)).float()


def least_squares(product: float, energy: float) -> float:
    """The gain <wanted, outputs> / <outputs, outputs>; 1 where that is no number above 0."""
    return product / energy if product > 0 and energy > 0 else 1.0


def _solved(y: Tensor, factor: DenseFactor, dtype: torch.dtype) -> Tensor:
    """y H^-1 = ((y R^-T) D^-1) R^-1, [N, K] float32, by blocks of columns.

    Args:
        y: [N, K] float32; not changed.
        dtype: of the factors of products from one block to the others.
    """
    y, r = y.clone(), factor.feedback
    blocks = column_slices(len(r))
    for block in reversed(blocks):
        inside = r[block, block].T
        y[:, block] = torch.linalg.solve_triangular(
            inside, y[:, block], upper=False, left=False, unitriangular=True
        )
        _subtract_product(y[:, : block.start], y[:, block], r[: block.start, block].T, dtype)
    y /= factor.curvature
    for block in blocks:
        y[:, block] = torch.linalg.solve_triangular(
            r[block, block], y[:, block], upper=True, left=False, unitriangular=True
        )
        _subtract_product(y[:, block.stop :], y[:, block], r[block, block.stop :], dtype)
    return y


def _subtract_product(from_: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Subtract the product of two matrices in place."""
    if dtype == torch.float32:
        from_.addmm_(left, right, alpha=-1)
    else:
        from_ -= left.to(dtype) @ right.to(dtype)
