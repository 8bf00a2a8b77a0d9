"""Gather the statistics of linears' inputs, batch by batch, on the rank that rounds the linears.

Each rank runs its own batches, and each Hessian is of all batches. So the inputs of a batch are
sent to the rank that owns their statistics, which adds them in the order of the batches: the sums
are those of one process, to the bit. Ranks send rows [T, K] and not sums [K, K].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moepress.ranks import Ranks
from moepress.rounding.inputs import Inputs


class _Rows(NamedTuple):
    """Inputs of one call of a linear."""

    name: str  # of the linear that adds them, for all that share them
    x: Tensor  # [T, K]
    original: Tensor | None  # [T, K] in the original model


class _About(NamedTuple):
    """What tells the shape of `_Rows` from their bytes."""

    name: str
    shape: torch.Size
    dtypes: tuple[torch.dtype, ...]  # of x, and of the original inputs if there are any

    @property
    def sizes(self) -> list[int]:
        return [self.shape.numel() * dtype.itemsize for dtype in self.dtypes]


class Gathering:
    """Statistics of the inputs of a layer's linears.

    Args:
        ranks: that own the statistics.
        family: of the codec that the linears are rounded to.
        corrects: whether the original model's inputs will be given.
    """

    def __init__(self, ranks: Ranks, family: str, corrects: bool) -> None:
        self._ranks = ranks
        self._family = family
        self._corrects = corrects
        self._pending: list[_Rows] = []
        self._owners: dict[str, int] | None = None
        self.inputs: dict[str, Inputs] = {}  # of this rank, by the linear that adds them

    def add(self, name: str, x: Tensor, original: Tensor | None) -> None:
        """Add inputs [..., K] of a call of linear `name`, and those of the original model."""
        before = None if original is None else original.flatten(0, -2)
        rows = _Rows(name, x.flatten(0, -2), before)
        if self._ranks.count == 1:
            self._add(rows)
        else:
            self._pending.append(rows)

    def end_batch(self) -> None:
        """Send the inputs of a batch to their owners. All ranks call this together."""
        ranks = self._ranks
        if ranks.count == 1:
            return
        if self._owners is None:
            self._owners = ranks.agreed(self._divided)
        about: list[list[_About]] = [[] for _ in range(ranks.count)]
        parts: list[list[Tensor]] = [[torch.empty(0, dtype=torch.uint8)] for _ in about]
        for rows in self._pending:
            owner = self._owners[rows.name]
            values = [rows.x] if rows.original is None else [rows.x, rows.original]
            about[owner].append(_About(rows.name, rows.x.shape, tuple(v.dtype for v in values)))
            parts[owner] += [value.contiguous().view(-1).view(torch.uint8) for value in values]
        everyones = ranks.everyones(about)
        device = self._pending[0].x.device if self._pending else ranks.device
        self._pending.clear()
        received = ranks.swap([torch.cat([p.to(device) for p in part]) for part in parts])
        for of_one, data in zip(everyones, received, strict=True):  # by rank: the order of batches
            expected = of_one[ranks.rank]
            pieces = iter(torch.split(data, [size for one in expected for size in one.sizes]))
            for one in expected:
                x, *original = (
                    next(pieces).clone().view(dtype).view(one.shape).to(device)
                    for dtype in one.dtypes
                )
                self._add(_Rows(one.name, x, original[0] if original else None))

    def _add(self, rows: _Rows) -> None:
        if rows.name not in self.inputs:
            features, device = rows.x.shape[-1], rows.x.device
            self.inputs[rows.name] = Inputs(features, device, self._family, self._corrects)
        self.inputs[rows.name].add(rows.x, rows.original)

    def _divided(self) -> dict[str, int]:
        """The rank that owns the inputs of each name, by their Hessians' sizes."""
        loads = {rows.name: float(rows.x.shape[-1]) ** 2 for rows in self._pending}
        return dict(zip(loads, self._ranks.owners(list(loads.values())), strict=True))
