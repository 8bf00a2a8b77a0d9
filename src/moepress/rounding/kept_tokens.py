"""Statistics of few inputs: the tokens themselves, in place of sums [K, K].

With T tokens x' [T, K], each times the root of its weight, and d [T, K] their differences to the
original model, the correction (correction.py) with a ridge m is

    W M (H + m I)^-1 = (W d^T) (x' x'^T + m I)^-1 x'

because H = x'^T x' and M = d^T x'. The system is solved for W d^T [N, T] or for x' [T, K], which
has less. That takes 4 T K N + T^2 K + 2 T^2 min(K, N) operations in place of 2 T K^2 + K^3 / 3
+ 4 K^2 N, the gain of rounded weights is read off the outputs, and the factor of the
Hessian may be one of tokens (token_factor.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.rounding.correction import least_squares
from moepress.rounding.factor import Factor
from moepress.rounding.hessian import (
    Hessian,
    TokenWeights,
    add_upper_products,
    check_finite,
    not_definite,
    tensor_cores,
)
from moepress.rounding.token_factor import factor_of_tokens, few
from moepress.sending import sent


def keeps(tokens: int, columns: int) -> bool:
    """Whether to keep tokens in place of sums [K, K]: they take no more memory with differences."""
    return 2 * tokens <= columns


class KeptTokens:
    """Keeps x' and, with `corrects`, d, in float32.

    Args:
        features: K.
        tokens: T, how many will be added.
        corrects: whether the original model's inputs will be given.
    """

    def __init__(
        self, features: int, tokens: int, device: torch.device | str, corrects: bool
    ) -> None:
        shape = tokens, features
        self._x = torch.empty(shape, dtype=torch.float32, device=device)
        self._difference = torch.zeros_like(self._x) if corrects else None
        self._added = 0
        self._weights = TokenWeights()

    def add(
        self,
        x: Tensor,
        original: Tensor | None,
        weight: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add tokens, see `Inputs.add`. All inputs are in the basis of the rounded weights.

        Args:
            dtype: not used.
        """
        here = slice(self._added, self._added + len(x))
        if here.stop > len(self._x):
            raise RuntimeError(f"Got {here.stop} tokens, expected at most {len(self._x)}.")
        self._added = here.stop
        self._weights.add(len(x), weight)
        weight = torch.ones(len(x)) if weight is None else weight
        root = sent(weight, self._x.device).float().sqrt()[:, None]
        torch.mul(x.detach().float(), root, out=self._x[here])
        if self._difference is not None and original is not None:
            difference = torch.sub(original.detach().float(), x.detach().float())
            torch.mul(difference, root, out=self._difference[here])

    @property
    def tokens(self) -> float:
        """Effective number of tokens, see `TokenWeights`."""
        return self._weights.tokens

    @property
    def weights(self) -> Tensor:
        """[T] weights of the tokens."""
        return self._weights.all

    @property
    def corrects(self) -> bool:
        return self._difference is not None

    def corrected(
        self, weight: Tensor, damping: float, strength: float, dtype: torch.dtype
    ) -> Tensor:
        """W + strength * W M H^-1, [N, K] float32, see `Correction.corrected`.

        Args:
            weight: [N, K] float32.
            dtype: float32 or bfloat16, of the factors of products with W.
        """
        if not self.tokens or self._difference is None:
            return weight
        x, difference = self._x[: self._added], self._difference[: self._added]
        columns = x.shape[1]
        with tensor_cores(x.device):
            between = x.new_zeros(len(x), len(x))  # x x^T
            add_upper_products(between, x.T)
            diagonal = between.diagonal()
            check_finite(diagonal)
            mean = diagonal.double().sum().item() / columns
            if not mean:
                return weight
            used = max(damping, columns / self.tokens)
            diagonal.add_(used * mean)
            lower, info = torch.linalg.cholesky_ex(between.T)
            if info.item():
                raise not_definite(columns, used)
            moved = weight.to(dtype) @ difference.to(dtype).T
            if len(weight) < columns:
                moved = torch.cholesky_solve(moved.T.float(), lower).T
            else:
                x = torch.cholesky_solve(x, lower)
            return weight.add(moved.to(dtype) @ x.to(dtype), alpha=strength)

    def factor(self, damping: float) -> Factor:
        """Factor of the Hessian with this damping."""
        x = self._x[: self._added]
        if few(*x.shape):
            return factor_of_tokens(x, damping)
        hessian = Hessian(x.shape[1], x.device)
        hessian.add(x)
        return hessian.factor(damping)

    def gain(self, weight: Tensor, rounded: Tensor, factor: Factor, dtype: torch.dtype) -> float:
        """The gain of rounded weights, see `Correction.gain`.

        Args:
            weight, rounded: [N, K] float32.
            factor: not used.
            dtype: float32 or bfloat16, of the factors of products.
        """
        if self._difference is None:
            return 1.0
        x, difference = self._x[: self._added], self._difference[: self._added]
        with tensor_cores(x.device):
            now = (x.to(dtype) @ rounded.to(dtype).T).float()
            wanted = ((x + difference).to(dtype) @ weight.to(dtype).T).float()
        product = (wanted * now).sum(1).double().sum().item()
        energy = now.square_().sum(1).double().sum().item()
        return least_squares(product, energy)
