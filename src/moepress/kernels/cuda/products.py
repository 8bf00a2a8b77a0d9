"""The kernels that multiply activation codes with packed matrices, and how their grids are chosen.

All have the same parameters (trellis_decode.cu lists them) and the same grid: blocks of weight
rows, splits, panels. A panel is some positions of one expert. A split is a range of columns, in
whole groups; the parts of a product that splits make are added up afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """One kernel.

    Attributes:
        kernel: its name.
        panel: the most positions of a panel.
        rows: weight rows of a block.
        threads: of a block.
        shared: bytes of dynamic shared memory, from columns, group size, splits and planes.
        least: the fewest groups of a split.
        resident: blocks for each multiprocessor that fill the card.
    """

    kernel: str
    panel: int
    rows: int
    threads: int
    shared: Callable[[int, int, int, int], int]
    least: int
    resident: int

    def row_blocks(self, rows: int) -> int:
        return -(-rows // self.rows)

    def splits(self, rows: int, groups: int, panels: int, multiprocessors: int) -> int:
        """The number of splits that gives every multiprocessor work, none of them empty."""
        blocks = self.row_blocks(rows) * panels
        wanted = -(-multiprocessors * self.resident // blocks)
        each = -(-groups // max(1, min(wanted, groups // self.least)))
        return -(-groups // each)


def _no_shared(cols: int, group: int, splits: int, planes: int) -> int:
    return 0


# Few positions for each expert (a panel takes up to 8 at the price of one), or many.
FEW = {
    "trellis": Product("moepress_trellis_decode", 8, 64, 128, _no_shared, 1, 4),
    "int": Product("moepress_scalar_decode", 8, 64, 128, _no_shared, 1, 4),
}
MANY = {
    "trellis": Product("moepress_trellis_prefill", 64, 64, 128, _no_shared, 4, 2),
    "int": Product("moepress_scalar_prefill", 64, 64, 128, _no_shared, 4, 2),
}
FEW_PER_EXPERT = 8  # positions for each expert, on average, up to which they are few
FEW_ROWS = 16  # the same for a matrix alone


def product(family: str, positions: int, matrices: int) -> Product:
    """The kernel for a number of positions that are shared by some matrices."""
    few = FEW_ROWS if matrices == 1 else FEW_PER_EXPERT * matrices
    return (FEW if positions <= few else MANY)[family]
