"""Parts of a packed trellis matrix, each a packed matrix of its own, for other devices.

How a matrix is cut is part of the format: docs/format.md, "Cutting a matrix". Parts run on every
backend like whole matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import ROWS_PER_SLAB, Codec
from moepress.kernels.trellis import TILE_COLUMNS, run_length, split


def columns_part(
    packed: Tensor, rows: int, cols: int, codec: Codec, start: int, stop: int
) -> Tensor:
    """Columns start .. stop - 1: a packed [rows, stop - start] matrix.

    The products of all parts, each with its own inputs, add up to those of the matrix.

    Args:
        packed: [codec.nbytes(rows, cols)] uint8.
        start, stop: multiples of the rotation's run and of the group size.

    Raises:
        InputError: the range does not fit.
    """
    unit = max(run_length(cols), codec.group_size)
    _check("Columns", start, stop, cols, unit)
    if run_length(stop - start) < run_length(cols):
        raise InputError(f"{stop - start} columns are rotated in other runs than {cols}.")
    codes, scales = split(packed, rows, cols, codec)
    tiles = codes.view(len(codes), cols // TILE_COLUMNS, -1)
    kept = tiles[:, start // TILE_COLUMNS : stop // TILE_COLUMNS]
    return torch.cat([kept.flatten(), scales.view(torch.uint8)])


def rows_part(packed: Tensor, rows: int, cols: int, codec: Codec, start: int, stop: int) -> Tensor:
    """Rows start .. stop - 1, and 64 rows of zeros: a packed [64 S + 64, cols] matrix.

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


def _check(what: str, start: int, stop: int, size: int, unit: int) -> None:
    fits = start % unit == 0 and (stop % unit == 0 or stop == size)
    if not (0 <= start < stop <= size and fits):
        raise InputError(
            f"{what} {start} to {stop} of {size} are no part: expected multiples of {unit}."
        )
