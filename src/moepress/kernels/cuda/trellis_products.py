"""How the products of trellis matrices are launched: grid, block, shared memory, splits."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 64  # of a slab
CHUNK = 128  # columns that a warp of the decode kernel takes at a time
WARPS = 4  # MOEPRESS_TRELLIS_WARPS of trellis_decode.cu
DECODE_SHARED = WARPS * 8 * 68 * 4  # partial sums: [warps][tokens][kPitch] float32
BLOCKS = 5  # of a multiprocessor
MOST_SPLITS = 8


@dataclass(frozen=True)
class Launch:
    """What a product needs beside its arguments."""

    grid: tuple[int, int, int]
    block: int
    shared: int  # bytes of dynamic shared memory
    splits: int  # ranges of columns, which blocks of their own compute
    slabs: int  # slabs of a block; its warps share the columns of each


def panel_size(planes: int) -> int:
    """Tokens of a panel of the decode kernel: the planes of 4 tokens fill an mma as 8 tokens do."""
    return 8 // planes


def decode_launch(rows: int, cols: int, panels: int, multiprocessors: int) -> Launch:
    """The launch for [rows, cols] matrices and up to `panels` panels of `panel_size` tokens.

    It minimizes the time of the busiest multiprocessor, in units of a chunk of a slab that one warp
    computes while the multiprocessor is full, with a fixed cost for each warp.
    """
    slabs, chunks = -(-rows // ROWS), -(-cols // CHUNK)
    full = WARPS * BLOCKS
    best: tuple[float, int, int] | None = None
    for per_block in (4, 2, 1):
        for splits in range(1, MOST_SPLITS + 1):
            ranges = WARPS // per_block * splits
            if ranges > chunks:
                break
            blocks = -(-slabs // per_block) * splits * panels
            waves = -(-blocks // (multiprocessors * BLOCKS))
            last = blocks - (waves - 1) * multiprocessors * BLOCKS
            # A multiprocessor that is not full takes less time for each warp, down to a fifth.
            warps = -(-last // multiprocessors) * WARPS
            time = (waves - 1 + max(warps / full, 0.2)) * (-(-chunks // ranges) + 2) + 0.5 * splits
            if best is None or time < best[0]:
                best = time, splits, per_block
    assert best is not None
    _, splits, per_block = best
    grid = (-(-slabs // per_block), splits, panels)
    return Launch(grid, 32 * WARPS, DECODE_SHARED, splits, per_block)
