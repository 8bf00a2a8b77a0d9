"""Activations as integer codes: where they are, and the kernels that round them (rounding.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels import trellis
from moepress.kernels.cuda.launch import DTYPES, Launcher
from moepress.kernels.cuda.products import Product

NO_ROUTING = (None, 0, None, None, 0, 0, 0, None, None, None, None)
MOST_SORTED_BY_32 = 512  # experts: the counts of so many by 32 warps fit into 99 KB, all cards have
UNIT = 128  # columns that a warp of rounding.cuh takes if they are not rotated


class Codes:
    """Rounded activations: codes [planes, rows, K], scales and sums [rows, K / g]."""

    def __init__(
        self,
        like: Tensor,
        rows: int,
        cols: int,
        group: int,
        planes: int,
        family: str,
        halves: bool = False,
    ) -> None:
        self.rows, self.cols, self.group, self.planes = rows, cols, group, planes
        self.halves = int(halves)  # the order of codes, as in rounding.cuh
        groups = cols // group
        self.rotated = family == "trellis"
        self.q = like.new_empty((planes, rows, cols), dtype=torch.int8)
        self.scale = like.new_empty((rows, groups), dtype=torch.float32)
        self.sum = like.new_empty((rows, groups), dtype=torch.int32)

    def parts(self, kernel: Product, rows: int, panels: int, launcher: Launcher) -> tuple[int, int]:
        """How many parts of the rows, and of the columns, are blocks of their own."""
        return kernel.parts(rows, self.cols, self.group, panels, launcher.multiprocessors)

    def round(
        self,
        launcher: Launcher,
        x: Tensor,
        routing: tuple[Tensor | int | None, ...] = NO_ROUTING,
        experts: int = 0,
    ) -> None:
        """Codes of x [rows, K]. `routing`: arguments of routing.cuh; one more block sorts pairs."""
        pairs = routing[1]
        assert isinstance(pairs, int)
        warps = 8 if pairs <= 2048 or experts > MOST_SORTED_BY_32 else 32
        blocks = self._blocks(warps) + (pairs > 0)
        shared = 4 * experts * (warps + 1)
        args = x, DTYPES[x.dtype], self.rows, self.cols, *self._rounding(), *routing
        launcher.launch("moepress_inputs", (blocks, 1, 1), 32 * warps, shared, args)

    def glu(self, launcher: Launcher, out: Tensor, used: Tensor, activation: int) -> None:
        """Codes of act(gate) * up of the first used[0] rows; out [splits, rows, 2 K]."""
        args = out, out.shape[0], self.rows, used, self.cols, activation, *self._rounding()
        launcher.launch("moepress_gated", (self._blocks(8), 1, 1), 256, 0, args)

    def any_gate(
        self,
        launcher: Launcher,
        out: Tensor,
        used: Tensor,
        gate: tuple[Tensor | int | float | None, ...],
    ) -> None:
        """The same for any gate and biases: `gates.gate_arguments`; out [splits, rows, R]."""
        args = out, out.shape[0], self.rows, used, self.cols, *self._rounding(), *gate
        launcher.launch("moepress_gated_any", (self._blocks(8), 1, 1), 256, 0, args)

    def _blocks(self, warps: int) -> int:
        """Blocks of so many warps that round all rows; a warp takes a unit."""
        unit = trellis.run_length(self.cols) if self.rotated else min(UNIT, self.cols & -self.cols)
        return -(-self.rows * (self.cols // unit) // warps)

    def _rounding(self) -> tuple[int | Tensor, ...]:
        how = int(self.rotated), self.group, self.planes, self.halves
        return *how, self.q, self.scale, self.sum
