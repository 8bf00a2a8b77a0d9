"""Parts of a packed matrix, each a packed matrix of its own, for other devices.

How a matrix is cut is part of the format: docs/format.md, "Cutting a matrix". Parts run on every
backend like whole matrices. `cut_rows` and `cut_columns` take any range, and say where in the
smallest part around it the range lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError
from moepress.format.codec import ALIGNMENT, ROWS_PER_BLOCK, ROWS_PER_SLAB, Codec
from moepress.kernels.trellis import TILE_COLUMNS, run_length, split


@dataclass(frozen=True, eq=False)
class Cut:
    """A part of a matrix around some rows or columns that are wanted.

    Attributes:
        packed: the part, a packed matrix.
        before: rows or columns of the part that lie before the first wanted one.
        size: rows or columns of the part.
    """

    packed: Tensor
    before: int
    size: int


def cut_rows(packed: Tensor, rows: int, cols: int, codec: Codec, wanted: range) -> Cut:
    """The smallest part of a packed [rows, cols] matrix that has the rows `wanted`."""
    unit = ROWS_PER_SLAB if codec.family == "trellis" else ROWS_PER_BLOCK
    start, stop = wanted.start // unit * unit, min(-(-wanted.stop // unit) * unit, rows)
    if (start, stop) == (0, rows):
        return Cut(packed, wanted.start, rows)
    if codec.family == "trellis":
        part = rows_part(packed, rows, cols, codec, start, stop)
        return Cut(part, wanted.start - start, -(-(stop - start) // unit) * unit + unit)
    blocks = blocks_of(packed, rows, cols, codec)[start // unit : -(-stop // unit)]
    return Cut(from_blocks(blocks), wanted.start - start, stop - start)


def cut_columns(packed: Tensor, rows: int, cols: int, codec: Codec, wanted: range) -> Cut:
    """The smallest part of a packed [rows, cols] matrix that has the columns `wanted`.

    Where no smaller part is rotated like the matrix, that is the matrix itself.
    """
    trellis = codec.family == "trellis"
    unit = max(run_length(cols) if trellis else 0, codec.group_size)
    start, stop = wanted.start // unit * unit, -(-wanted.stop // unit) * unit
    rotated_alike = not trellis or run_length(stop - start) == run_length(cols)
    if stop > cols or not rotated_alike or stop - start == cols:
        return Cut(packed, wanted.start, cols)
    part = columns_part(packed, rows, cols, codec, start, stop)
    return Cut(part, wanted.start - start, stop - start)


def columns_part(
    packed: Tensor, rows: int, cols: int, codec: Codec, start: int, stop: int
) -> Tensor:
    """Columns start .. stop - 1: a packed [rows, stop - start] matrix.

    The products of all parts, each with its own inputs, add up to those of the matrix.

    Args:
        packed: [codec.nbytes(rows, cols)] uint8.
        start, stop: multiples of the group size and, of trellis codes, of the rotation's run.

    Raises:
        InputError: the range does not fit.
    """
    if codec.family == "int":
        return _columns_of_blocks(packed, rows, cols, codec, start, stop)
    unit = max(run_length(cols), codec.group_size)
    _check("Columns", start, stop, cols, unit)
    if run_length(stop - start) != run_length(cols):
        raise InputError(f"{stop - start} columns are rotated in other runs than {cols}.")
    codes, scales = split(packed, rows, cols, codec)
    tiles = codes.view(len(codes), cols // TILE_COLUMNS, -1)
    kept = tiles[:, start // TILE_COLUMNS : stop // TILE_COLUMNS]
    return torch.cat([kept.flatten(), scales.view(torch.uint8)])


def rows_part(packed: Tensor, rows: int, cols: int, codec: Codec, start: int, stop: int) -> Tensor:
    """Rows start .. stop - 1 of trellis codes, and 64 rows of zeros: [64 S + 64, cols], packed.

    S = (stop - start) / 64, rounded up. The first stop - start products are those of the rows. The
    last slab is there for the paths: they come to the first rows of a matrix from its last slab, so
    it has the last words of the slab above the rows, and no scales.

    Args:
        packed: [codec.nbytes(rows, cols)] uint8.
        start: a multiple of 64.
        stop: a multiple of 64, or `rows`.

    Raises:
        InputError: the range does not fit.
    """
    _check("Rows", start, stop, rows, ROWS_PER_SLAB)
    codes, scales = split(packed, rows, cols, codec)
    first, last = start // ROWS_PER_SLAB, -(-stop // ROWS_PER_SLAB)
    above = codes[first - 1 : first] if first else codes[-1:]
    words = torch.zeros_like(above).view(-1, round(2 * codec.bits), ROWS_PER_SLAB)  # of two tiles
    ends = [-1 - int(codec.bits), -1]  # the last word of each tile
    words[:, ends] = above.view_as(words)[:, ends]
    kept = scales[first * ROWS_PER_SLAB : last * ROWS_PER_SLAB]
    none = scales.new_zeros(ROWS_PER_SLAB)
    parts = codes[first:last].flatten(), words.flatten(), torch.cat([kept, none]).view(torch.uint8)
    return torch.cat(parts)


def _columns_of_blocks(
    packed: Tensor, rows: int, cols: int, codec: Codec, start: int, stop: int
) -> Tensor:
    """Columns of a scalar matrix: of each block the tiles, scales and zeros of some groups."""
    _check("Columns", start, stop, cols, codec.group_size)
    groups = slice(start // codec.group_size, stop // codec.group_size)
    blocks = blocks_of(packed, rows, cols, codec)
    count = codec.groups(cols)
    codes = ROWS_PER_BLOCK * codec.group_size * codec.number // 8 * count
    scales = 2 * ROWS_PER_BLOCK * count
    parts = blocks.tensor_split((codes, codes + scales), dim=1)
    kept = [
        torch.unflatten(part, 1, (count, -1))[:, groups].flatten(1)
        for part in parts
        if part.numel()
    ]
    return from_blocks(torch.cat(kept, dim=1))


def blocks_of(packed: Tensor, rows: int, cols: int, codec: Codec) -> Tensor:
    """The blocks of a scalar matrix, [blocks, bytes] uint8."""
    count = -(-rows // ROWS_PER_BLOCK)
    size = codec.block_bytes(cols)
    return packed[: count * size].view(count, size)


def from_blocks(blocks: Tensor) -> Tensor:
    """Blocks as a packed matrix, with the bytes of 0 at its end."""
    flat = blocks.flatten()
    return F.pad(flat, (0, -len(flat) % ALIGNMENT))


def _check(what: str, start: int, stop: int, size: int, unit: int) -> None:
    fits = start % unit == 0 and (stop % unit == 0 or stop == size)
    if not (0 <= start < stop <= size and fits):
        raise InputError(
            f"{what} {start} to {stop} of {size} are no part: expected multiples of {unit}."
        )
