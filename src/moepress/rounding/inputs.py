"""Statistics of a matrix's inputs that rounding needs, gathered token by token.

The Hessian says which errors cost (hessian.py); the correction, how the inputs differ from the
original model's (correction.py). Trellis codes store rotated weights, so for them inputs are
rotated before they are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels.trellis import rotate, rotate_back
from moepress.rounding.correction import Correction
from moepress.rounding.hessian import Factor, Hessian
from moepress.rounding.methods import Matrix

RIDGE = 0.15  # damping of trellis Hessians is at least this times K inputs over T tokens
# (docs/log.md#damping-by-tokens)


class Inputs:
    """Hessian and correction of a matrix's inputs.

    Args:
        features: K.
        family: of the codec that the matrix is rounded to.
        corrects: whether the original model's inputs will be given.
    """

    def __init__(
        self, features: int, device: torch.device | str, family: str, corrects: bool
    ) -> None:
        self._rotates = family == "trellis"
        self._hessian = Hessian(features, device)
        self._correction = Correction(features, device) if corrects else None

    def add(self, x: Tensor, original: Tensor | None, weight: Tensor | None = None) -> None:
        """Adds T tokens.

        Args:
            x: [T, K], any float dtype: the inputs now.
            original: [T, K], the inputs in the original model, token by token; None: unknown.
            weight: [T], at least 0: weight of each token; None: 1.
        """
        x = self._rotated(x)
        self._hessian.add(x, weight)
        if self._correction is not None and original is not None:
            self._correction.add(x, self._rotated(original), weight)

    def corrected(self, weight: Tensor, damping: float, strength: float) -> Tensor:
        """The weights [N, K] to round instead, see `Correction.corrected`. Call before `factor`."""
        if self._correction is None:
            return weight
        rotated = self._rotated(weight.float())
        target = self._correction.corrected(rotated, self._hessian.copy(), damping, strength)
        return rotate_back(target) if self._rotates else target

    def factor(self, damping: float) -> Factor:
        """Factor of the Hessian. This uses the Hessian up: nothing can be added afterwards.

        Args:
            damping: the least, in units of the mean of the diagonal. Trellis codes get more where
                tokens are few, because feedback would fit what is peculiar to those tokens.
        """
        hessian = self._hessian
        if self._rotates and hessian.tokens:
            damping = max(damping, RIDGE * hessian.features / hessian.tokens)
        return hessian.factor(damping)

    def rescaled(self, rounded: Matrix, weight: Tensor, factor: Factor) -> Matrix:
        """A rounded matrix times the gain that brings its outputs nearest to the original ones.

        Args:
            weight: [N, K] of the original model.
            factor: what `factor` returned.
        """
        if self._correction is None or not self._hessian.tokens:
            return rounded
        rotated = self._rotated(weight.float()), self._rotated(rounded.dequantize())
        return rounded.scaled(self._correction.gain(*rotated, factor))

    def _rotated(self, x: Tensor) -> Tensor:
        return rotate(x) if self._rotates else x
