"""The LDL factorization of a Hessian, H = R D R^T, by what rounding asks of it (hessian.py).

R [K, K] is unit upper triangular and D diagonal. `DenseFactor` holds R. `TokenFactor`
(token_factor.py) holds T tokens instead, which takes less time and memory where they are few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moepress.kernels.trellis import TILE_COLUMNS
from moepress.rounding.sweep import Feedback, slices
from moepress.sending import sent

PROBES = 128  # random vectors that norms of rows are measured by
COLUMNS_PER_SLICE = 1024  # triangular matrices are used in column slices


class Factor(ABC):
    """LDL factorization H + damping * mean(diag H) * I = R D R^T. One serves every width.

    Attributes:
        curvature: [K] float32, D: cost of a unit of squared error in column k if the columns after
            it compensate.
        damping: that was used, after retries.
    """

    curvature: Tensor
    damping: float

    @abstractmethod
    def products(self, columns: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """R^T w, [K, N]: the product w R, columns first. Some rows at a time, in order.

        Args:
            columns: [K, N] float32, w transposed.
            dtype: float32 or bfloat16: of the factors of products, and of the result.
        """

    @abstractmethod
    def diagonal_blocks(self, size: int) -> Tensor:
        """The blocks of R on the diagonal, [K / size, size, size] float32."""

    @abstractmethod
    def by_column(self) -> Feedback:
        """R, for sweeps that visit columns one by one."""

    @abstractmethod
    def by_block(self, dtype: torch.dtype = torch.float32) -> Feedback:
        """V, for sweeps that visit `TILE_COLUMNS` columns together: V_JB = R_JB R_BB^(-1).

        V is block upper triangular, with identities on the diagonal.

        Args:
            dtype: float32 or bfloat16, of the large products of the sweep.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """R, [K, K] float32."""

    @abstractmethod
    def fitted(self) -> Tensor:
        """Degrees of freedom that each column adds to a fit of the columns before it, [K] float32.

        Of the T tokens, T - m are left once m columns and the damping have fitted them. With u_k
        the residuals of column k after the columns behind it, column k takes ||u_k||^2 / D_k. The
        sum over all columns is trace(H (H + damping)^-1). Single ones may be estimates.
        """


@dataclass(frozen=True)
class DenseFactor(Factor):
    """A factor that holds R [K, K]."""

    feedback: Tensor  # [K, K] float32, R
    curvature: Tensor
    damping: float

    def products(self, columns: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        columns = columns.to(dtype)
        for here in column_slices(len(columns)):
            above = slice(here.stop)
            yield torch.mm(self.feedback[above, here].T.to(dtype), columns[above])

    def diagonal_blocks(self, size: int) -> Tensor:
        return diagonal_blocks(self.feedback, size)

    def by_column(self) -> Feedback:
        return self.feedback

    def by_block(self, dtype: torch.dtype = torch.float32) -> Feedback:
        return block_feedback(self.feedback).to(dtype)

    def dense(self) -> Tensor:
        return self.feedback

    def fitted(self) -> Tensor:
        # D_k = ||u_k||^2 + added (1 + ||w_k||^2): the weights of the regression are row k of R^-1.
        r, d = self.feedback, self.curvature
        trace = (r.square() @ d).double().sum()  # of H + added: K * mean * (1 + damping)
        added = trace / len(d) * self.damping / (1 + self.damping)
        probes = sent(_probes(len(d)), r.device)
        solved: Tensor = torch.linalg.solve_triangular(r, probes, upper=True, unitriangular=True)
        squares = solved.square().sum(1) / probes[0].square().sum()
        return 1 - added.float() * squares / d


@lru_cache(maxsize=8)
def _probes(columns: int) -> Tensor:
    """[K, P]: the squared norms of rows [K] of a matrix A are about those of A times this, over P.

    Of few columns they are exact. Of many they are 1/8 of each off, and their sums much less.
    """
    if columns <= PROBES:
        return torch.eye(columns)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (columns, PROBES), generator=generator).float().mul(2).sub(1)


def column_slices(columns: int) -> list[slice]:
    """The columns of a matrix in the slices in which sums and products are computed."""
    return slices(columns, COLUMNS_PER_SLICE)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of a square matrix [K, K], [K / size, size, size], not copied."""
    blocks = matrix.unfold(0, size, size).unfold(1, size, size)
    return blocks.diagonal().permute(2, 0, 1)


def over_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Every column block of a matrix [M, K] times the inverse of its diagonal block, [M, K].

    Args:
        blocks: [K / 8, 8, 8] unit upper triangular.
    """
    one = torch.eye(TILE_COLUMNS, device=blocks.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, one, upper=True, unitriangular=True)
    by_block = rows.view(len(rows), len(blocks), TILE_COLUMNS).transpose(0, 1)  # [K / 8, M, 8]
    return torch.bmm(by_block, inverse).transpose(0, 1).reshape(rows.shape)


def block_feedback(feedback: Tensor) -> Tensor:
    """V [K, K] float32 from R [K, K]: block upper triangular, identities on the diagonal."""
    size = TILE_COLUMNS
    if feedback.device.type != "cpu":  # there one call for each block would take longer
        return over_blocks(feedback, diagonal_blocks(feedback, size))
    # Zeros of NumPy: pages of the lower triangle, which are never written, take no memory.
    result = torch.from_numpy(np.zeros(feedback.shape, np.float32))
    for start in range(0, len(feedback), size):
        block = slice(start, start + size)
        rows = slice(start + size)
        result[rows, block] = torch.linalg.solve_triangular(
            feedback[block, block], feedback[rows, block],
            upper=True, left=False, unitriangular=True,
        )  # fmt: skip
    return result
