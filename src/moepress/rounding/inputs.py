"""Statistics of a matrix's inputs, gathered chunk by chunk: a Hessian and a correction.

The Hessian gives the cost of rounding errors (hessian.py). The correction compares the inputs with
those of the original model (correction.py). Trellis codes store rotated weights, so inputs are
rotated before they are added to the statistics of a trellis matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.rounding.correction import Correction, sums_moved
from moepress.rounding.hessian import Factor, Hessian
from moepress.rounding.methods import Matrix
from moepress.rounding.rotation import rotate, rotate_back

# For K inputs and T tokens, Hessians for trellis codes are damped by at least RIDGE * K / T
# (docs/log.md#damping-by-tokens).
RIDGE = 0.15


class Inputs:
    """Hessian and correction of a matrix's inputs.

    Args:
        features: K.
        family: of the codec that the matrix is rounded to.
        corrects: whether the original model's inputs will be given.
        weight: [N, K], the only matrix with these inputs; None: there may be several.
        slices: of the columns, whose sums this rank computes; None: all.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str,
        family: str,
        corrects: bool,
        weight: Tensor | None = None,
        slices: Sequence[slice] | None = None,
    ) -> None:
        self._slices = slices
        self._rotates = family == "trellis"
        self._hessian = Hessian(features, device)
        self._correction: Correction | None = None
        if corrects:
            alone = weight is not None and sums_moved(*weight.shape)
            rotated = self._rotated(weight.float()) if weight is not None and alone else None
            self._correction = Correction(features, device, rotated)

    def add(self, x: Tensor, original: Tensor | None, weight: Tensor | None = None) -> None:
        """Add T tokens.

        Args:
            x: [T, K], any float dtype: the inputs once earlier layers are rounded.
            original: [T, K], the inputs in the original model, token by token; None: not needed.
            weight: [T], at least 0: weight of each token; None: 1.
        """
        x = self._rotated(x)
        self._hessian.add(x, weight, self._slices)
        if self._correction is not None and original is not None:
            self._correction.add(x, self._rotated(original), weight, self._slices)

    def rows(self, own: slice) -> list[Tensor]:
        """The sums of a slice of the columns, not copied: what ranks send to the one that has all.

        A weight must not have been given: then there is no such sum.
        """
        of_hessian = self._hessian.rows(own)
        if self._correction is None:
            return [of_hessian]
        return [of_hessian, self._correction.rows(own)]

    def corrected(self, weight: Tensor, damping: float, strength: float) -> Tensor:
        """The weights [N, K] to round in place of `weight`, see `Correction.corrected`.

        `weight` itself if no correction is gathered. Call this before `factor`, which uses up the
        Hessian.
        """
        if self._correction is None:
            return weight
        rotated = self._rotated(weight.float())
        target = self._correction.corrected(rotated, self._hessian.copy(), damping, strength)
        return rotate_back(target) if self._rotates else target

    def factor(self, damping: float) -> Factor:
        """Factor of the Hessian. This uses the Hessian up: nothing can be added afterwards.

        Args:
            damping: least damping, in units of the mean of the diagonal. For trellis codes it is
                raised where tokens are few, because error feedback would fit their noise.
        """
        hessian = self._hessian
        if self._rotates and hessian.tokens:
            damping = max(damping, RIDGE * hessian.features / hessian.tokens)
        return hessian.factor(damping)

    def rescaled(self, rounded: Matrix, weight: Tensor, factor: Factor) -> Matrix:
        """The rounded matrix times the gain that brings its outputs nearest to the original ones.

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
