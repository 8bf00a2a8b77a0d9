"""Weights that make up for the rounding errors of earlier layers.

A layer is rounded behind layers that are rounded already, so its inputs x'_t are not the x_t that
the original model has for the same tokens. Rounding W as it is keeps W x'_t, but W x_t is wanted.
The linear map of x'_t that comes nearest to it (least squares, token weights c_t) is

    W* = W + W M H^-1,     M = sum_t c_t (x_t - x'_t) x'_t^T,     H = sum_t c_t x'_t x'_t^T

and sum_t c_t || W x_t - What x'_t ||^2 = trace((W* - What) H (W* - What)^T) + a term without What.
So it suffices to round W* with the Hessian of x'. Corrections of this kind: GPTAQ
(arXiv:2504.02692), QEP (arXiv:2504.09629).

M also holds what is peculiar to the T tokens it was measured on, and each of K inputs lets W* fit
some of that. Therefore H is damped by K / T of its mean diagonal where that is more than its other
damping (ridge regression with signal and noise of equal size), and only a share of the correction
is applied: W + strength * W M H^-1 (docs/log.md#correction).

With H = R D R^T (hessian.py), two triangular solves give W M H^-1.

A single gain for the whole matrix cannot over-fit, so it is applied in full. What is multiplied by

    g = sum_t c_t <W x_t, What x'_t> / sum_t c_t || What x'_t ||^2
      = (<W, What>_H + <W M, What>) / <What, What>_H,          <A, B>_H = trace(A H B^T) .

It is above 1 for `down`: rounding to the least squared error takes energy from gate and from up,
and the input of `down` is a product of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.rounding.hessian import COLUMNS_PER_PANEL, TOKENS_PER_CHUNK, Factor, Hessian


class Correction:
    """Accumulates M = sum_t weight_t (x_t - x'_t) x'_t^T in float32. Holds one [K, K] matrix."""

    def __init__(self, features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)

    def add(self, x: Tensor, original: Tensor, weight: Tensor | None = None) -> None:
        """Adds T tokens.

        Args:
            x: [T, K], any float dtype: the layer's inputs now, x'.
            original: [T, K], its inputs in the original model, token by token.
            weight: [T], at least 0: weight of each token; None: 1.
        """
        weight = torch.ones(len(x)) if weight is None else weight
        for start in range(0, len(x), TOKENS_PER_CHUNK):
            chunk = slice(start, start + TOKENS_PER_CHUNK)
            now = x[chunk].detach().to(self._sum)
            moved = original[chunk].detach().to(self._sum) - now
            moved *= weight[chunk].to(moved)[:, None]
            self._sum.addmm_(moved.T, now)

    def corrected(
        self, weight: Tensor, hessian: Hessian, damping: float, strength: float
    ) -> Tensor:
        """W + strength * W M H^-1, [N, K] float32; W if no token was added.

        Args:
            weight: [N, K], any float dtype.
            hessian: of the same x' and token weights. It is used up.
            damping: of the Hessian, at least.
            strength: 0 (W as it is) to 1 (the full correction).

        Raises:
            NumericalError: the Hessian holds NaN or infinity.
        """
        w = weight.float()
        if not hessian.tokens:
            return w
        factor = hessian.factor(max(damping, weight.shape[1] / hessian.tokens))
        y = w @ self._sum
        lower = factor.feedback.T  # y H^-1 = ((y R^-T) D^-1) R^-1
        y = torch.linalg.solve_triangular(lower, y, upper=False, left=False, unitriangular=True)
        y /= factor.curvature
        y = torch.linalg.solve_triangular(
            factor.feedback, y, upper=True, left=False, unitriangular=True
        )
        return w.add(y, alpha=strength)

    def gain(self, weight: Tensor, rounded: Tensor, factor: Factor) -> float:
        """The g whose g * What comes nearest to the original outputs; 1 if that is not above 0.

        Args:
            weight: [N, K] W, any float dtype.
            rounded: [N, K] What, float32.
            factor: of the Hessian of the same x' and token weights; its damping is taken out again.
        """
        w = weight.float()
        # H = R D R^T - damping * mean * I, and the trace of R D R^T is K * mean * (1 + damping).
        trace = (factor.feedback.square() @ factor.curvature).double().sum().item()
        added = trace / w.shape[1] * factor.damping / (1 + factor.damping)
        product = ((w @ self._sum - added * w) * rounded).double().sum().item()
        energy = -added * rounded.double().square().sum().item()
        for start in range(0, w.shape[1], COLUMNS_PER_PANEL):
            stop = min(start + COLUMNS_PER_PANEL, w.shape[1])
            panel = factor.feedback[:stop, start:stop]  # R is upper triangular
            left = rounded[:, :stop] @ panel
            curvature = factor.curvature[start:stop]
            product += ((w[:, :stop] @ panel) * left * curvature).double().sum().item()
            energy += (left.square() * curvature).double().sum().item()
        return product / energy if product > 0 and energy > 0 else 1.0
