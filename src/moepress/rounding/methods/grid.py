"""Grids of the scalar codes: the scale and the zero of each group, and the codes of its weights.

Each group, `group_size` consecutive weights of one row, has a grid of `levels + 1` points:

    w ~ scale * (code - zero)        code in 0 .. levels          (the scalar codec, codec.py)

All functions here work on the same B columns of n rows at once: n groups, B = group size. Weights
are stored columns first, [B, n]; a variable named `group` holds such weights. A column is then
contiguous in memory, every step works on whole columns, and a statistic of all n groups is a
product with a vector of B column weights.

Code units. Dividing by the scale and adding the zero turns weights into positions on the grid:

    position = w / scale + zero,    code = round(clamp(position, 0, levels)),
    residual = position - code = (w - scale * (code - zero)) / scale

Residuals are of order 1 whatever the magnitude of the weights, so their squares neither overflow
nor vanish. `scale` is rounded to bfloat16 and `zero` to its byte before codes are chosen, so errors
are measured on the values that are stored.
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
# By device type. 4096 rows x 128 columns x 4 bytes fill the L2 caches of two cores.
ROWS_PER_CHUNK = {"cpu": 4096}
# By code bits: scale of the shrunken grid relative to the min-max grid (docs/log.md#group-grids).
SHRINK = {2: 0.7, 3: 0.85, 4: 0.9}


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix as codes on one grid per row and group."""

    codes: Tensor  # [N, K] uint8
    scales: Tensor  # [N, G] bfloat16, G groups in a row
    zeros: Tensor | None  # [N, G] uint8; None: the codec's grids are symmetric
    codec: Codec

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [N, K] that the codes stand for: scale * (code - zero).

        Computed in float32, then cast to `dtype`.
        """
        levels = self.codec.levels
        codes = self.codes.float().view(*self.scales.shape, self.codec.group_size)  # [N, G, B]
        zero = levels / 2 if self.zeros is None else self.zeros.float()[..., None] * levels / 255
        return (self.scales.float()[..., None] * (codes - zero)).flatten(1).to(dtype)

    def scaled(self, gain: float) -> QuantizedMatrix:
        """This matrix times a gain above 0. Only its scales change; they are rounded again."""
        return replace(self, scales=(self.scales.float() * gain).bfloat16())

    def pack(self) -> Tensor:
        """The stored bytes (docs/format.md)."""
        return pack(self.codes, self.scales, self.zeros, self.codec)


@dataclass(frozen=True)
class Grid:
    """The grids of n groups. Both fields hold only values that can be stored."""

    scale: Tensor  # [n] float32, exact in bfloat16; 0 where all weights of a group are 0
    zero: Tensor  # [n] float32: zero_code * levels / 255, or levels / 2 for symmetric grids

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None, codec: Codec) -> Grid:
        """The nearest grid that can be stored to `scale` [n] and `zero` [n].

        Args:
            zero: None: the grid is symmetric.
        """
        scale = scale.bfloat16().float()
        scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
        if zero is None:
            return cls(scale, torch.full_like(scale, codec.levels / 2))
        return cls(
            scale, (zero * (255 / codec.levels)).round_().clamp_(0, 255) * codec.levels / 255
        )

    def replaced(self, where: Tensor, other: Grid) -> Grid:
        """The grids of `other` where `where`, [n] bool, is true; these grids elsewhere."""
        return Grid(
            torch.where(where, other.scale, self.scale), torch.where(where, other.zero, self.zero)
        )

    @property
    def inverse(self) -> Tensor:
        """[n] float32: 1 / scale, or 0 where the scale is 0."""
        return torch.where(self.scale > 0, 1 / self.scale, 0.0)

    def positions(self, group: Tensor) -> Tensor:
        """Positions [B, n] float32 of the weights [B, n] of n groups, in code units."""
        return torch.addcmul(self.zero, group, self.inverse)


def min_max(group: Tensor, codec: Codec) -> Grid:
    """The smallest grid that spans 0 and all weights of a group, for each group of [B, n]."""
    if not codec.has_zero:
        return Grid.of(group.abs().amax(0) * (2 / codec.levels), None, codec)
    low, high = group.amin(0).clamp_(max=0), group.amax(0).clamp_(min=0)
    scale = (high - low) / codec.levels
    return Grid.of(scale, -low / scale.clamp(min=SMALLEST_SCALE), codec)


def mean_magnitude(group: Tensor, codec: Codec, weight: Tensor | None = None) -> Grid:
    """The 1-bit grid -s/2, +s/2 of least squared error: s/2 is the mean of |w|.

    Args:
        group: [B, n].
        weight: [B] above 0, of the columns in that mean; None: all alike.
    """
    mean = group.abs().mean(0) if weight is None else (weight / weight.sum()) @ group.abs()
    return Grid.of(2 * mean, None, codec)


def search(group: Tensor, codec: Codec, weight: Tensor) -> Grid:
    """A grid with a small sum_k weight_k * (w_k - ŵ_k)^2 for each group.

    Takes the better of the min-max grid and a shrunken copy of it, then improves it once: given its
    codes, a linear regression of weights on codes gives the best scale and zero. The result is
    never worse than min-max: the error of every candidate is computed with the values that would be
    stored, and a candidate is taken only if it has the smaller error. More candidates and more
    regressions lower this sum, but not the loss of the quantized model (docs/log.md#group-grids).

    Args:
        group: [B, n] float32, the weights of n groups.
        weight: [B] float32, above 0: cost of a unit of squared error in each column.
    """
    if codec.bits == 1:
        return mean_magnitude(group, codec, weight)
    whole = min_max(group, codec)
    if codec.bits == 8:  # 255 levels: nothing to gain from clipping
        return whole
    weight = weight / weight.sum()
    shrunken = Grid.of(whole.scale * SHRINK[codec.number], whole.zero, codec)

    def judge(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted squared error [n] in units of the squared min-max scale; residuals; codes."""
        residual = grid.positions(group)
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
    """The grid that fits the weights best while their codes stay the same.

    Let p be the positions of weights on the grid (s, z), and c their codes. Linear regression gives
    p ~ (1 + slope) * c + offset. So the weights s * (p - z) are nearly
    s * (1 + slope) * (c - (z - offset) / (1 + slope)), which has the form of a new scale and zero.

    Args:
        weight: [B] of the columns, sum 1.
        residual, codes: [B, n] on `grid`. Both are overwritten.
    """
    mean_code, mean_residual = weight @ codes, weight @ residual
    covariance = weight @ residual.mul_(codes) - mean_code * mean_residual
    variance = weight @ codes.square_() - mean_code.square()
    slope = covariance / variance.clamp(min=1e-6)
    stretch = (1 + slope).clamp(min=0.1)  # keeps the scale positive
    offset = mean_residual - slope * mean_code
    return Grid.of(grid.scale * stretch, (grid.zero - offset) / stretch, codec)


def in_row_chunks(
    weight: Tensor, codec: Codec, rounder: Callable[[Tensor, Output], None]
) -> QuantizedMatrix:
    """Quantize a matrix a chunk of rows at a time. Rows are independent of each other.

    Args:
        weight: [N, K], any float dtype.
        rounder: called with a chunk of the rows of `weight` [n, K]; fills the `Output` of the same
            rows.

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
        chunk = weight[start : start + step]
        if not chunk.isfinite().all():
            raise NumericalError(
                "The weight matrix holds NaN or infinity. Check the source checkpoint."
            )
        rounder(chunk, out.rows(start, start + step))
    if not out.scales.isfinite().all():
        raise NumericalError(
            "A group's scale overflowed bfloat16 while quantizing: weights or error feedback are "
            "beyond 1e38. Check the weights, or raise the damping."
        )
    return QuantizedMatrix(out.codes, out.scales, out.zeros, codec)


@dataclass(frozen=True)
class Output:
    """n rows of a quantized matrix that is being filled, group by group."""

    codes: Tensor  # [n, K] uint8
    scales: Tensor  # [n, G] bfloat16
    zeros: Tensor | None  # [n, G] uint8
    codec: Codec

    def rows(self, start: int, stop: int) -> Output:
        """Views of rows start .. stop."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Output(self.codes[start:stop], self.scales[start:stop], zeros, self.codec)

    def put(self, group: int, codes: Tensor, grid: Grid) -> None:
        """Store a group.

        Args:
            group: its index in the row.
            codes: [B, n] float32, integers in 0 .. levels.
            grid: of the n groups.
        """
        size = self.codec.group_size
        columns = slice(group * size, (group + 1) * size)
        self.codes[:, columns] = codes.to(torch.uint8).T.contiguous()
        self.scales[:, group] = grid.scale.bfloat16()
        if self.zeros is not None:
            self.zeros[:, group] = (grid.zero * (255 / self.codec.levels)).round().to(torch.uint8)


def columns_first(weight: Tensor, start: int, stop: int) -> Tensor:
    """Columns start .. stop of a weight [n, K], columns first: [stop - start, n] float32."""
    # Copying first, then transposing, is 7 times as fast as one strided copy.
    return weight[:, start:stop].contiguous().T.contiguous().float()
