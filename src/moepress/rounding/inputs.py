"""What rounding a matrix needs to know of its inputs, gathered token by token.

The Hessian says which errors cost (hessian.py), the drift what the original's inputs were
(drift.py). Trellis codes are of rotated weights, so their inputs are rotated before they are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels.trellis import rotate, rotate_back
from moepress.rounding.correction import Drift
from moepress.rounding.hessian import Factor, Hessian
from moepress.rounding.methods.grid import QuantizedMatrix
from moepress.rounding.methods.trellis import TrellisMatrix

Matrix = QuantizedMatrix | TrellisMatrix


RIDGE = 0.15  # damping of K inputs over T tokens, at least, of trellis codes (docs/log.md)


class Inputs:
    """Hessian and drift of a matrix's inputs.

    Args:
        features: K.
        family: of the codec that the matrix is rounded to.
        drifts: whether the original's inputs will be given.
    """

    def __init__(
        self, features: int, device: torch.device | str, family: str, drifts: bool
    ) -> None:
        self._rotated = family == "trellis"
        self._hessian = Hessian(features, device)
        self._drift = Drift(features, device) if drifts else None

    def add(self, x: Tensor, original: Tensor | None, weight: Tensor | None = None) -> None:
        """Adds T tokens.

        Args:
            x: [T, K], any float dtype: inputs as they are now.
            original: [T, K], those of the original model, token by token; None: not known.
            weight: [T], at least 0: the importance of each token, 1 when absent.
        """
        x = self._turned(x)
        self._hessian.add(x, weight)
        if self._drift is not None and original is not None:
            self._drift.add(x, self._turned(original), weight)

    def corrected(self, weight: Tensor, damping: float, strength: float) -> Tensor:
        """Weights [N, K] to round in place of these, see `Drift.corrected`. Before `factor`."""
        if self._drift is None:
            return weight
        turned = self._turned(weight.float())
        wanted = self._drift.corrected(turned, self._hessian.copy(), damping, strength)
        return rotate_back(wanted) if self._rotated else wanted

    def factor(self, damping: float) -> Factor:
        """Of the Hessian, which is used up: nothing can be added after.

        Args:
            damping: in units of the mean of the diagonal, at least. Trellis codes get more where
                tokens are few: feedback would follow what is peculiar to them.
        """
        hessian = self._hessian
        if self._rotated and hessian.tokens:
            damping = max(damping, RIDGE * hessian.features / hessian.tokens)
        return hessian.factor(damping)

    def rescaled(self, rounded: Matrix, weight: Tensor, factor: Factor) -> Matrix:
        """A rounded matrix times what brings it nearest to the outputs of `weight`: `Drift.gain`.

        Args:
            weight: [N, K] as the original has it.
            factor: that of `factor`.
        """
        if self._drift is None or not self._hessian.tokens:
            return rounded
        turned = self._turned(weight.float()), self._turned(rounded.dequantize())
        return rounded.scaled(self._drift.gain(*turned, factor))

    def _turned(self, x: Tensor) -> Tensor:
        return rotate(x) if self._rotated else x
