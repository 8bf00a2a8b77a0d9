"""Statistics of a matrix's inputs, gathered chunk by chunk: a Hessian and a correction.

The Hessian gives the cost of rounding errors (hessian.py). The correction compares the inputs with
those of the original model (correction.py). Trellis codes store rotated weights, so inputs are
rotated before they are added to the statistics of a trellis matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.rounding.correction import sums_moved
from moepress.rounding.factor import Factor
from moepress.rounding.kept_tokens import KeptTokens, keeps
from moepress.rounding.methods import Matrix
from moepress.rounding.rotation import rotate, rotate_back
from moepress.rounding.summed_tokens import SummedTokens
from moepress.rounding.sweep import in_16_bits

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
        tokens: how many will be added; None: not known, so many.
        slices: of the columns, whose sums this rank computes; None: all.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str,
        family: str,
        corrects: bool,
        weight: Tensor | None = None,
        tokens: int | None = None,
        slices: Sequence[slice] | None = None,
    ) -> None:
        self._rotates = family == "trellis"
        self._features = features
        self._statistics: KeptTokens | SummedTokens
        if tokens is not None and keeps(tokens, features):
            self._statistics = KeptTokens(features, tokens, device, corrects)
            return
        alone = corrects and weight is not None and sums_moved(*weight.shape)
        moved = self._rotated(weight.float()) if weight is not None and alone else None
        self._statistics = SummedTokens(features, device, corrects, moved, slices)

    def add(self, x: Tensor, original: Tensor | None, weight: Tensor | None = None) -> None:
        """Add T tokens.

        Args:
            x: [T, K], any float dtype: the inputs once earlier layers are rounded.
            original: [T, K], the inputs in the original model, token by token; None: not needed.
            weight: [T], at least 0: weight of each token; None: 1.
        """
        if original is not None and self._statistics.corrects:
            original = self._rotated(original)
        self._statistics.add(self._rotated(x), original, weight, _products_dtype(x))

    def rows(self, own: slice) -> list[Tensor]:
        """The sums of a slice of the columns, not copied: what ranks send to the one that has all.

        Only where sums [K, K] are kept: neither `weight` nor `tokens` was given.
        """
        assert isinstance(self._statistics, SummedTokens)
        return self._statistics.rows(own)

    @property
    def tokens(self) -> float:
        """Effective number of tokens (hessian.py `TokenWeights`)."""
        return self._statistics.tokens

    @property
    def weights(self) -> Tensor:
        """[T] weights of the tokens, in the order in which they were added."""
        return self._statistics.weights

    def corrected(self, weight: Tensor, damping: float, strength: float) -> Tensor:
        """The weights [N, K] to round in place of `weight`, see `Correction.corrected`.

        `weight` itself if no correction is gathered. Call this before `factor`, which uses up the
        Hessian.
        """
        if not self._statistics.corrects:
            return weight
        rotated = self._rotated(weight.float())
        dtype = _products_dtype(weight)
        target = self._statistics.corrected(rotated, damping, strength, dtype)
        return rotate_back(target) if self._rotates else target

    def factor(self, damping: float) -> Factor:
        """Factor of the Hessian. This uses the Hessian up: nothing can be added afterwards.

        Args:
            damping: least damping, in units of the mean of the diagonal. For trellis codes it is
                raised where tokens are few, because error feedback would fit their noise.
        """
        if self._rotates and self.tokens:
            damping = max(damping, RIDGE * self._features / self.tokens)
        return self._statistics.factor(damping)

    def rescaled(self, rounded: Matrix, weight: Tensor, factor: Factor) -> Matrix:
        """The rounded matrix times the gain that brings its outputs nearest to the original ones.

        Args:
            weight: [N, K] of the original model.
            factor: what `factor` returned.
        """
        if not self._statistics.corrects or not self.tokens:
            return rounded
        rotated = self._rotated(weight.float()), self._rotated(rounded.dequantize())
        return rounded.scaled(self._statistics.gain(*rotated, factor, _products_dtype(weight)))

    def _rotated(self, x: Tensor) -> Tensor:
        return rotate(x) if self._rotates else x


def _products_dtype(like: Tensor) -> torch.dtype:
    """Of products for corrections and gains, from weights or inputs."""
    return torch.bfloat16 if in_16_bits(like.dtype, like.device) else torch.float32
