"""Grids: which scale and zero a group of weights gets, and the codes its weights fall on.

A grid of `levels + 1` points is laid over each group (a run of `group_size` weights of one row):

    w ~ scale * (code - zero)        code in 0 .. levels          (the scalar codec, codec.py)

Everything here works on a block of one group of columns by n rows, *columns first*:
`block # [B, n]` with B = group size. A column of weights is then one contiguous run of memory,
every step is a whole-row operation, and a statistic of each group is a product with a vector of B
column weights.

Code units. Dividing by the scale and adding the zero turns weights into positions on the grid:

    position = w / scale + zero,    code = round(clamp(position, 0, levels)),
    residual = position - code = (w - scale * (code - zero)) / scale

Residuals are of order 1 whatever the magnitude of the weights, so their squares neither overflow
nor vanish. `scale` is rounded to bfloat16 and `zero` to its byte before any code is chosen, so the
error that is measured is the error that is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.errors import InputError, NumericalError
from moepress.format.codec import Codec
from moepress.kernels.scalar import pack

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it 1 / scale overflows
ROWS_PER_CHUNK = {"cpu": 4096}  # 4096 rows x 128 columns x 4 bytes: the L2 caches of two cores
SHRINK = {2: 0.7, 3: 0.85, 4: 0.9}  # of min-max, by bits; docs/log.md


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix as codes on one grid per row and group."""

    codes: Tensor  # [N, K] uint8
    scales: Tensor  # [N, G] bfloat16
    zeros: Tensor | None  # [N, G] uint8, absent when the codec's grid is symmetric
    codec: Codec

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for, [N, K]: scale * (code - zero) in float32, cast."""
        levels = self.codec.levels
        codes = self.codes.float().view(*self.scales.shape, self.codec.group_size)  # [N, G, B]
        zero = levels / 2 if self.zeros is None else self.zeros.float()[..., None] * levels / 255
        return (self.scales.float()[..., None] * (codes - zero)).flatten(1).to(dtype)

    def scaled(self, gain: float) -> QuantizedMatrix:
        """All weights times a number above 0: its scales, rounded again."""
        return replace(self, scales=(self.scales.float() * gain).bfloat16())

    def pack(self) -> Tensor:
        """The stored bytes, docs/format.md."""
        return pack(self.codes, self.scales, self.zeros, self.codec)


@dataclass(frozen=True)
class Grid:
    """The grids of n groups. Both fields hold only values that can be stored."""

    scale: Tensor  # [n] float32, each a bfloat16 number; 0 where the group is zero
    zero: Tensor  # [n] float32, each zero_code * levels / 255, or levels / 2

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None, codec: Codec) -> Grid:
        """The storable grid nearest to `scale` and `zero` (no zero: a symmetric grid)."""
        scale = scale.bfloat16().float()
        scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
        if zero is None:
            return cls(scale, torch.full_like(scale, codec.levels / 2))
        return cls(
            scale, (zero * (255 / codec.levels)).round_().clamp_(0, 255) * codec.levels / 255
        )

    def replaced(self, where: Tensor, other: Grid) -> Grid:
        """The grids of `other` where `where # [n] bool`, these elsewhere."""
        return Grid(
            torch.where(where, other.scale, self.scale), torch.where(where, other.zero, self.zero)
        )

    @property
    def inverse(self) -> Tensor:
        """1 / scale, or 0 where the scale is 0.  # [n] float32"""
        return torch.where(self.scale > 0, 1 / self.scale, 0.0)

    def positions(self, block: Tensor) -> Tensor:
        """Where weights lie on the grid, in code units.  # [B, n] float32"""
        return torch.addcmul(self.zero, block, self.inverse)


def min_max(block: Tensor, codec: Codec) -> Grid:
    """The grid that spans a group and 0 exactly. `block # [B, n]`."""
    if not codec.has_zero:
        return Grid.of(block.abs().amax(0) * (2 / codec.levels), None, codec)
    low, high = block.amin(0).clamp_(max=0), block.amax(0).clamp_(min=0)
    scale = (high - low) / codec.levels
    return Grid.of(scale, -low / scale.clamp(min=SMALLEST_SCALE), codec)


def mean_magnitude(block: Tensor, codec: Codec, weight: Tensor | None = None) -> Grid:
    """The 1-bit grid -s/2, +s/2 with s/2 = mean |w|: the least squared error of any sign grid."""
    mean = block.abs().mean(0) if weight is None else (weight / weight.sum()) @ block.abs()
    return Grid.of(2 * mean, None, codec)


def search(block: Tensor, codec: Codec, weight: Tensor) -> Grid:
    """A grid with a small sum_k weight_k * (w_k - what_k)^2 for each group.

    Takes the better of min-max and a shrunken copy of it, then improves it once: given its codes,
    the best scale and zero are a linear regression of weights on codes. Never worse than min-max,
    because every candidate is judged as it would be stored, and replaces only what it beats. More
    candidates and more regressions lower this sum, but not the loss of the quantized model.

    Args:
        block: [B, n] float32, the weights of one group of columns.
        weight: [B] float32, above 0: what a unit of squared error in each column costs.
    """
    if codec.bits == 1:
        return mean_magnitude(block, codec, weight)
    whole = min_max(block, codec)
    if codec.bits == 8:  # 255 levels: nothing to gain from clipping
        return whole
    weight = weight / weight.sum()
    shrunken = Grid.of(whole.scale * SHRINK[codec.bits], whole.zero, codec)

    def judge(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted squared error [n], relative to the min-max scale; residuals; codes."""
        residual = grid.positions(block)
        codes = residual.clamp(0, codec.levels).round_()
        residual -= codes
        error = weight @ residual.square() * (grid.scale * whole.inverse).square()
        return error, residual, codes

    error, *rounding = judge(whole)
    refit = _regression(whole, codec, weight, *rounding)
    shrunken_error, *rounding = judge(shrunken)
    better = shrunken_error < error
    best = whole.replaced(better, shrunken)
    refit = refit.replaced(better, _regression(shrunken, codec, weight, *rounding))
    return best.replaced(judge(refit)[0] < torch.minimum(error, shrunken_error), refit)


def _regression(grid: Grid, codec: Codec, weight: Tensor, residual: Tensor, codes: Tensor) -> Grid:
    """The grid that fits weights best whose codes are given. Overwrites `residual` and `codes`.

    Let p be positions and c codes on the grid (s, z). With p ~ (1 + slope) * c + offset, weights
    are s * (p - z) ~ s * (1 + slope) * (c - (z - offset) / (1 + slope)): a new scale and zero.
    """
    mean_code, mean_residual = weight @ codes, weight @ residual
    covariance = weight @ residual.mul_(codes) - mean_code * mean_residual
    variance = weight @ codes.square_() - mean_code.square()
    slope = covariance / variance.clamp(min=1e-6)
    stretch = (1 + slope).clamp(min=0.1)  # a scale stays positive
    offset = mean_residual - slope * mean_code
    return Grid.of(grid.scale * stretch, (grid.zero - offset) / stretch, codec)


def in_row_chunks(
    weight: Tensor, codec: Codec, rounder: Callable[[Tensor, Output], None]
) -> QuantizedMatrix:
    """Quantizes a matrix a chunk of rows at a time; rows are independent of each other.

    Args:
        weight: [N, K], any float dtype.
        rounder: fills an `Output` from the same rows of the weight.

    Raises:
        InputError: the weight is not a matrix or its rows are not whole groups.
        NumericalError: a weight is NaN or infinite, or a scale overflows.
    """
    if weight.ndim != 2:
        raise InputError(f"A weight matrix has 2 dimensions, got shape {list(weight.shape)}.")
    weight = weight.detach()
    groups = codec.groups(weight.shape[1])
    rows = weight.shape[0]
    out = Output(
        torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format),
        weight.new_empty((rows, groups), dtype=torch.bfloat16),
        weight.new_empty((rows, groups), dtype=torch.uint8) if codec.has_zero else None,
        codec,
    )
    step = ROWS_PER_CHUNK.get(weight.device.type, rows)
    for start in range(0, rows, max(step, 1)):
        part = weight[start : start + step]
        if not part.isfinite().all():
            raise NumericalError(
                "The weight matrix holds NaN or infinity. Check the source checkpoint."
            )
        rounder(part, out.rows(start, start + step))
    if not out.scales.isfinite().all():
        raise NumericalError(
            "A group's scale overflowed bfloat16 while quantizing: weights or error feedback are "
            "beyond 1e38. Check the weights, or raise the damping."
        )
    return QuantizedMatrix(out.codes, out.scales, out.zeros, codec)


@dataclass(frozen=True)
class Output:
    """Rows of a quantized matrix that is being filled."""

    codes: Tensor  # [n, K] uint8
    scales: Tensor  # [n, G] bfloat16
    zeros: Tensor | None  # [n, G] uint8
    codec: Codec

    def rows(self, start: int, stop: int) -> Output:
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Output(self.codes[start:stop], self.scales[start:stop], zeros, self.codec)

    def put(self, group: int, codes: Tensor, grid: Grid) -> None:
        """Stores a group: `codes # [B, n] float32`, all whole numbers in 0 .. levels."""
        size = self.codec.group_size
        columns = slice(group * size, (group + 1) * size)
        self.codes[:, columns] = codes.to(torch.uint8).T.contiguous()
        self.scales[:, group] = grid.scale.bfloat16()
        if self.zeros is not None:
            self.zeros[:, group] = (grid.zero * (255 / self.codec.levels)).round().to(torch.uint8)


def columns_first(weight: Tensor, start: int, stop: int) -> Tensor:
    """Columns start .. stop of a weight as a block.  # [stop - start, n] float32"""
    return weight[:, start:stop].contiguous().T.contiguous().float()  # 7 x faster than at once
