"""How the products of trellis matrices are launched: grid, block, shared memory, splits."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 64  # of a slab: what a block of the decode kernel computes
UNIT = 32  # columns that a warp takes at a time
DECODE_WARPS = 8
DECODE_SHARED = DECODE_WARPS * 8 * 68 * 4  # partial sums: [warps][tokens][kPitch] float32
BLOCKS_PER_MULTIPROCESSOR = 3


@dataclass(frozen=True)
class Launch:
    """What a product needs beside its arguments."""

    grid: tuple[int, int, int]
    block: int
    shared: int  # bytes of dynamic shared memory
    splits: int  # ranges of columns, which blocks of their own compute


def panel_size(planes: int) -> int:
    """Tokens of a panel of the decode kernel: the planes of 4 tokens fill an mma as 8 tokens do."""
    return 8 // planes


def decode_launch(rows: int, cols: int, panels: int, multiprocessors: int) -> Launch:
    """The launch for [rows, cols] matrices and up to `panels` panels of `panel_size` tokens.

    Columns are split while that shortens the longest queue of a multiprocessor by a tenth or more,
    and every warp keeps at least two units.
    """
    blocks = -(-rows // ROWS) * panels
    most = max(1, cols // UNIT // (2 * DECODE_WARPS))
    best, best_time = 1, float("inf")
    for splits in range(1, min(most, 8) + 1):
        waves = -(-blocks * splits // multiprocessors)  # blocks that one multiprocessor computes
        time = waves / splits
        if time < 0.9 * best_time:
            best, best_time = splits, time
    return Launch((-(-rows // ROWS), best, panels), 32 * DECODE_WARPS, DECODE_SHARED, best)
