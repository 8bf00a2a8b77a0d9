"""Statistics of many inputs: their Hessian and the sums of a correction, [K, K]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.rounding.correction import Correction
from moepress.rounding.factor import Factor
from moepress.rounding.hessian import Hessian


class SummedTokens:
    """A Hessian and, with `corrects`, a correction.

    Args:
        features: K.
        corrects: whether the original model's inputs will be given.
        weight: [N, K] float32, the only matrix with these inputs, if W M is to be summed; None: M
            is.
        slices: those of `column_slices` that are summed here; None: all.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str,
        corrects: bool,
        weight: Tensor | None,
        slices: Sequence[slice] | None = None,
    ) -> None:
        self._slices = slices
        self._hessian = Hessian(features, device)
        self._correction = Correction(features, device, weight) if corrects else None

    def add(
        self, x: Tensor, original: Tensor | None, weight: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Add tokens, see `Inputs.add`. All inputs are in the basis of the rounded weights."""
        self._hessian.add(x, weight, self._slices)
        if self._correction is not None and original is not None:
            self._correction.add(x, original, weight, dtype, self._slices)

    def rows(self, own: slice) -> list[Tensor]:
        """The sums of a slice, not copied; see `Inputs.rows`."""
        of_hessian = self._hessian.rows(own)
        if self._correction is None:
            return [of_hessian]
        return [of_hessian, self._correction.rows(own)]

    @property
    def tokens(self) -> float:
        return self._hessian.tokens

    @property
    def weights(self) -> Tensor:
        """[T] weights of the tokens."""
        return self._hessian.weights

    @property
    def corrects(self) -> bool:
        return self._correction is not None

    def corrected(
        self, weight: Tensor, damping: float, strength: float, dtype: torch.dtype
    ) -> Tensor:
        """See `Correction.corrected`. The Hessian stays."""
        if self._correction is None:
            return weight
        hessian = self._hessian.copy()
        return self._correction.corrected(weight, hessian, damping, strength, dtype)

    def factor(self, damping: float) -> Factor:
        """Factor of the Hessian, which is used up."""
        return self._hessian.factor(damping)

    def gain(self, weight: Tensor, rounded: Tensor, factor: Factor, dtype: torch.dtype) -> float:
        """See `Correction.gain`."""
        if self._correction is None:
            return 1.0
        return self._correction.gain(weight, rounded, factor, dtype)
