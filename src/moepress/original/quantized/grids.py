"""Which weights of a matrix share a scale: blocks of rows and of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of one dimension of a matrix. The last block may be shorter."""

    size: int  # elements that share a scale
    halves: bool = False  # two matrices, each with blocks of its own: gate above up

    def count(self, length: int) -> int:
        """Blocks of a dimension of `length` elements."""
        if self.halves:
            return 2 * -(-(length // 2) // self.size)
        return -(-length // self.size)

    def index(self, length: int) -> Tensor:
        """[length] int64: the block of each element."""
        if not self.halves:
            return torch.arange(length) // self.size
        half = torch.arange(length // 2) // self.size
        return torch.cat([half, half + self.count(length) // 2])


Grid = tuple[Blocks, Blocks]  # of the rows and of the columns of a matrix


@dataclass(frozen=True)
class Sizes:
    """The blocks that a quantization may have."""

    block: tuple[int, int]  # rows and columns
    columns: tuple[int, ...]  # of a row that share a scale
    declared: bool  # config.json says so: one scale in place of a grid is damage

    def fitting(self, length: int, width: int, counts: tuple[int, int], fused: bool) -> Grid | None:
        """The grid of a matrix with `counts` blocks of rows and of columns; None: there is none.

        Args:
            length, width: rows and columns of the matrix.
            fused: it may be gate above up, each with blocks of its own.
        """
        rows, columns = self.block
        grids = [(Blocks(rows), Blocks(columns))]
        if fused and length % 2 == 0:
            grids.append((Blocks(min(rows, length // 2), halves=True), Blocks(columns)))
        grids += [(Blocks(1), Blocks(size)) for size in (*self.columns, width)]
        grids.append((Blocks(length), Blocks(1)))
        if not self.declared:
            grids.append((Blocks(length), Blocks(width)))
        return next((g for g in grids if (g[0].count(length), g[1].count(width)) == counts), None)
