"""Where the matrices of the experts lie in the parameters of a model, and how to bring them out.

moepress computes with, and stores, experts in one form only:

    gate_up [R, H]   gate rows first, then up rows: R = 2I; without a gate only up rows: R = I
    down    [H, I]
    biases  [R] and [H], in the order of the rows

Families keep them in other layouts: transposed, gate and up rows in turns, in two parameters, or
all experts in one matrix. A `Part` describes the layout of one of the two matrices as data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Part:
    """Where one matrix [N, K] of every expert lies in the parameters of transformers' class."""

    names: tuple[str, ...]  # paths of the parameters; their rows follow each other in the matrix
    bias: str | None = None  # path of the parameter [E, N]; None: no bias
    transposed: bool = False  # stored as [K, N]
    interleaved: bool = False  # rows of gate and up come in turns: gate 0, up 0, gate 1, ...
    flat: int | None = None  # rows of an expert in parameters [E * rows, K]; None: [E, N, K]

    @property
    def rows(self) -> int:
        """Entries of a parameter's first dimension that belong to one expert."""
        return 1 if self.flat is None else self.flat

    @property
    def stored(self) -> tuple[str, ...]:
        """All parameters that the matrices and biases of the experts come from."""
        return self.names if self.bias is None else (*self.names, self.bias)

    def matrix(self, values: Sequence[Tensor]) -> Tensor:
        """The matrix [N, K] of one expert.

        Args:
            values: what each of the parameters `names` has of it, with a first dimension of size 1
                unless the layout is flat.
        """
        matrices = [value.squeeze(0) if self.flat is None else value for value in values]
        whole = torch.cat([m.T if self.transposed else m for m in matrices]).contiguous()
        return self.in_order(whole, 0)

    def in_order(self, values: Tensor, dim: int) -> Tensor:
        """Values with one entry per row of the matrix along `dim`, gate rows first."""
        if not self.interleaved:
            return values
        gate, up = torch.unflatten(values, dim, (-1, 2)).unbind(dim + 1)
        return torch.cat([gate, up], dim)

    def parameters(self, matrices: Tensor) -> dict[str, Tensor]:
        """The parameters that hold matrices [E, N, K] of all experts: the inverse of `matrix`."""
        if self.interleaved:
            matrices = torch.stack(matrices.chunk(2, dim=1), dim=2).flatten(1, 2)
        parts = matrices.chunk(len(self.names), dim=1)
        parts = tuple(part.mT if self.transposed else part for part in parts)
        return {
            name: (part if self.flat is None else part.flatten(0, 1)).contiguous()
            for name, part in zip(self.names, parts, strict=True)
        }

    def biases(self, values: Tensor) -> Tensor:
        """The parameter that holds biases [E, N] in the order of the rows."""
        if not self.interleaved:
            return values
        return torch.stack(values.chunk(2, dim=1), dim=2).flatten(1, 2)


def padded_matrix(matrix: Tensor, parts: int, rows: int, cols: int) -> Tensor:
    """A matrix [parts * n, k] with zeros added: [parts * rows, cols]. Itself if nothing is added.

    Args:
        parts: how many matrices lie below each other; each gets rows of zeros at its end.
    """
    n, k = len(matrix) // parts, matrix.shape[1]
    if (n, k) == (rows, cols):
        return matrix
    apart = torch.unflatten(matrix, 0, (parts, n))
    return F.pad(apart, (0, cols - k, 0, rows - n)).flatten(0, 1)


def padded_bias(bias: Tensor, parts: int, rows: int) -> Tensor:
    """A bias [..., parts * n] with zeros added to each part: [..., parts * rows]."""
    n = bias.shape[-1] // parts
    if n == rows:
        return bias
    return F.pad(torch.unflatten(bias, -1, (parts, n)), (0, rows - n)).flatten(-2)


def without_padding(matrices: Tensor, parts: int, rows: int, cols: int) -> Tensor:
    """Matrices [E, parts * n, k] without the zeros that were added: [E, parts * rows, cols]."""
    apart = torch.unflatten(matrices, 1, (parts, -1))
    return apart[:, :, :rows, :cols].flatten(1, 2)


def widened(x: Tensor, cols: int) -> Tensor:
    """Inputs [..., k] with columns of zeros added: [..., cols]. x itself if it has as many."""
    return x if x.shape[-1] == cols else F.pad(x, (0, cols - x.shape[-1]))
