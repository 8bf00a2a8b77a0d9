"""The LDL factorization of the Hessian of few tokens, in time T^2 K and memory T K.

H = x^T x + l I, with the tokens x [T, K] (each times the root of its weight) and the damping l.
Columns are eliminated from the last one on, a run B at a time. After B and what lies behind it is
eliminated, what is left of H for the columns before is again of that form, with a matrix G [T, T]
between the tokens:

    H' = x^T G' x + l I,     G' = G - Z Z^T,   Z = G x_B U_B^(-T),   U_B U_B^T = x_B^T G x_B + l I

from G = I on (Woodbury). U_B, upper triangular, is the diagonal block of U = R D^(1/2), and above
it U_JB = x_J^T Z. So R is known by x, y_B = Z D_B^(-1/2), and its diagonal blocks:

    R_JB = x_J^T y_B,     R_BB = U_B D_B^(-1/2)

and products with R never need its K^2 numbers. 4 T^2 K operations replace T K^2 for the Hessian and
K^3 / 3 for its factorization. Later, products and sweeps (sweep.py) with N rows take 4 T K N in
place of K^2 N. So a factor of tokens is used up to T = K / 4.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.kernels.trellis import TILE_COLUMNS
from moepress.rounding.factor import Factor, block_feedback, diagonal_blocks, over_blocks
from moepress.rounding.hessian import DAMPING_RETRIES, check_finite, not_definite, warn_of_damping
from moepress.rounding.sweep import Feedback, TokenFeedback, runs

logger = logging.getLogger(__name__)


def few(tokens: int, columns: int) -> bool:
    """Whether a factor of tokens takes less than a dense one."""
    return 4 * tokens <= columns


@dataclass(frozen=True)
class TokenFactor(Factor):
    """A factor that holds tokens. Made by `factor_of_tokens`."""

    x: Tensor  # [T, K] float32
    y: Tensor  # [T, K] float32
    inner: tuple[Tensor, ...]  # R_BB of each run, [RUN, RUN] float32; the last one may be smaller
    curvature: Tensor
    damping: float

    def products(self, columns: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        x, y = self.x.to(dtype), self.y.to(dtype)
        outputs = columns.new_zeros(len(x), columns.shape[1])  # of the runs before
        for run, inner in zip(runs(len(columns)), self.inner, strict=True):
            here = columns[run].to(dtype)
            before = (y[:, run].T @ outputs.to(dtype)).float()
            yield (before + (inner.T.to(dtype) @ here)).to(dtype)
            outputs += x[:, run] @ here

    def diagonal_blocks(self, size: int) -> Tensor:
        return torch.cat([diagonal_blocks(inner, size) for inner in self.inner])

    def by_column(self) -> Feedback:
        return TokenFeedback(self.x, self.y, self.inner)

    def by_block(self, dtype: torch.dtype = torch.float32) -> Feedback:
        y = over_blocks(self.y, self.diagonal_blocks(TILE_COLUMNS))
        inner = tuple(block_feedback(one) for one in self.inner)
        return TokenFeedback(self.x.to(dtype), y.to(dtype), inner)

    def dense(self) -> Tensor:
        result = self.y.new_zeros(self.y.shape[1], self.y.shape[1])
        for run, inner in zip(runs(len(result)), self.inner, strict=True):
            result[: run.start, run] = self.x[:, : run.start].T @ self.y[:, run]
            result[run, run] = inner
        return result

    def fitted(self) -> Tensor:
        # Column k takes z_k z_k^T off G, whose trace is what is left, and y_k = z_k D_k^(-1/2).
        return self.y.square().sum(0) * self.curvature


def factor_of_tokens(x: Tensor, damping: float) -> TokenFactor:
    """LDL factorization of the damped Hessian x^T x, as `Hessian.factor` does it.

    Args:
        x: [T, K] float32, tokens times the roots of their weights. The factor keeps it.
        damping: added to the diagonal, in units of its mean.

    Raises:
        NumericalError: a token holds NaN or infinity, or the Hessian stays singular.
    """
    diagonal = x.square().sum(0)
    check_finite(diagonal)
    mean = diagonal.double().mean().item()
    columns = x.shape[1]
    for attempt in range(1 + DAMPING_RETRIES):
        used = damping * 10**attempt
        found = _factored(x, used * mean if mean else 1.0)
        if found is not None:
            if attempt:
                warn_of_damping(damping, used)
            return TokenFactor(x, *found, used)
    raise not_definite(columns, used)


def _factored(x: Tensor, added: float) -> tuple[Tensor, tuple[Tensor, ...], Tensor] | None:
    """y, R_BB of each run, and D; None if a diagonal block is not positive definite."""
    between = torch.eye(len(x), dtype=x.dtype, device=x.device)  # G
    y = torch.empty_like(x)
    inner: list[Tensor] = []
    curvature = x.new_empty(x.shape[1])
    for run in reversed(runs(x.shape[1])):
        here = x[:, run]
        moved = between @ here  # G x_B
        block = here.T @ moved
        block.diagonal().add_(added)
        lower, info = torch.linalg.cholesky_ex(block.flip(0, 1))
        if info.item() or not lower.diagonal().isfinite().all():
            return None
        upper = lower.flip(0, 1)  # U_B
        z = torch.linalg.solve_triangular(upper.T, moved, upper=False, left=False)
        between.addmm_(z, z.T, alpha=-1)
        root = upper.diagonal()
        y[:, run] = z / root
        inner.append(upper / root)
        curvature[run] = root.square()
    return y, tuple(reversed(inner)), curvature
