"""The kernels that multiply activation codes with packed matrices, and how their grids are chosen.

All have the same parameters (trellis_decode.cu lists them) and the same grid: blocks of weight
rows, splits, panels. A panel is some positions of one expert. A split is a range of columns, in
whole groups; the parts of a product that splits make are added up afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """One kernel.

    Attributes:
        kernel: its name; with variants, the beginning of it (see `name`).
        panels: the most positions of a panel, for codes of one and of two planes.
        rows: weight rows of a block.
        threads: of a block.
        shared: bytes of dynamic shared memory, from columns, group size, splits and planes.
        least: the fewest columns of a split.
        variants: whether each group size and number of planes has a kernel of its own.
        halves: the order of the codes it reads, as in rounding.cuh.
        resident: the blocks that run on a multiprocessor at the same time.
        enough: how many of them it takes to keep a multiprocessor busy.
        step: columns that a block takes at a time; 0: unknown.
        joins: 1, 2 or 4: the most parts of `rows` rows that the warps of a block can share.
    """

    kernel: str
    panels: tuple[int, int]
    rows: int
    threads: int
    shared: Callable[[int, int, int, int], int]
    least: int
    variants: bool = False
    halves: bool = False
    resident: int = 1
    enough: int = 1
    step: int = 0
    joins: int = 1

    def name(self, group: int, planes: int) -> str:
        """The name of the kernel for a group size and a number of planes."""
        return f"{self.kernel}_g{group}_p{planes}" if self.variants else self.kernel

    def panel(self, planes: int) -> int:
        """The most positions of a panel."""
        return self.panels[planes - 1]

    def row_blocks(self, rows: int) -> int:
        """How many blocks share the rows of a matrix."""
        return -(-rows // self.rows)

    def parts(
        self, rows: int, cols: int, group: int, panels: int, multiprocessors: int
    ) -> tuple[int, int]:
        """How many parts of the rows, and of the columns, are blocks of their own.

        For matrices [rows, cols] and busy panels. No part of the columns is empty. More parts are
        taken where they make the work of the busiest multiprocessor a tenth shorter.
        """
        groups, row_blocks = cols // group, self.row_blocks(rows)
        best, least_time = (row_blocks, 1), math.inf
        for joined in (1, 2, 4):
            if joined > self.joins:
                break
            blocks = -(-row_blocks // joined)
            for splits in range(1, min(MOST_SPLITS, joined * cols // self.least) + 1):
                queue = -(-blocks * panels * splits // multiprocessors)
                time = self._time(queue, joined * cols, splits)
                if time < 0.9 * least_time:
                    best, least_time = (blocks, splits), time
        return best[0], -(-groups // -(-groups // best[1]))

    def _time(self, queue: int, cols: int, splits: int) -> float:
        """The time that a multiprocessor takes for a queue of blocks, in an unknown unit.

        With known steps, in the time of a step of a full multiprocessor. Blocks begin with half a
        step; a step is shorter with fewer blocks beside. Measured with trellis_decode on an H200.
        """
        full, last = divmod(queue, self.resident)
        if not self.step:
            # Fewer blocks than enough at the same time take as long as these.
            return (queue - last + (max(last, self.enough) if last else 0)) / splits
        steps = -(-cols // (splits * self.step))
        alone = steps * (0.31 + 0.69 * last / self.resident) + 0.5 if last else 0
        return full * (steps + 0.5) + alone


def _trellis_decode_shared(cols: int, group: int, splits: int, planes: int) -> int:
    return 4 * 6400  # a ring for each warp, kRingBytes


def _trellis_prefill_shared(cols: int, group: int, splits: int, planes: int) -> int:
    return 99 << 10  # kShared


def _two_stages(cols: int, group: int, splits: int, planes: int) -> int:
    """8 tokens, 1024 columns and what keeps them in banks of their own, scales and sums; twice."""
    return 2 * (8704 * planes + 65536 // group)


def _ring(cols: int, group: int, splits: int, planes: int) -> int:
    """3 or 2 stages of one group: 64 tokens, their scales and sums; then 64 rows' numbers."""
    stride = group + (16 if group == 128 else 0)  # other banks for other tokens
    return (4 - planes) * (64 * planes * stride + 512) + 256


MOST_SPLITS = 8

# Few positions for each expert (a panel of them costs what one position does), or many.
FEW = {
    "trellis": Product(
        "moepress_trellis_decode",
        (8, 4),
        64,
        128,
        _trellis_decode_shared,
        512,
        variants=True,
        resident=4,
        step=512,
        joins=4,
    ),
    "int": Product(
        "moepress_scalar_decode",
        (8, 8),
        128,
        128,
        _two_stages,
        512,
        variants=True,
        resident=4,
        enough=3,
    ),
}
MANY = {
    "trellis": Product(
        "moepress_trellis_prefill",
        (128, 64),
        128,
        256,
        _trellis_prefill_shared,
        1024,
        variants=True,
        halves=True,
    ),
    "int": Product(
        "moepress_scalar_prefill",
        (64, 64),
        128,
        128,
        _ring,
        1024,
        variants=True,
        resident=2,
    ),
}
FEW_PER_EXPERT = 8  # positions for each expert, on average, up to which they are few
FEW_ROWS = 16  # the same for a matrix alone
GROUPED_PER_EXPERT = 300  # those from which products are torch's (grouped.py)
GROUPED_ROWS = 256  # the same for a matrix alone


def product(family: str, positions: int, matrices: int) -> Product:
    """The kernel for a number of positions that are shared by some matrices."""
    few = FEW_ROWS if matrices == 1 else FEW_PER_EXPERT * matrices
    return (FEW if positions <= few else MANY)[family]
