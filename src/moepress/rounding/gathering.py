"""Gather the statistics of linears' inputs, batch by batch, on the rank that rounds the linears.

Each rank runs its own batches, and each Hessian is of all batches. So the inputs of a batch are
sent to the rank that owns their statistics, which adds them in the order of the batches: the sums
are those of one process, to the bit. Ranks send rows [T, K] and not sums [K, K].

A layer may have one linear of so many inputs that its statistics take longer than all others
(attention's output in DeepSeek-V3: K = 16384). On CPUs such statistics are summed by all ranks,
each some slices of the columns, as one process sums slice by slice; in the end the owner gets them.
Cards sum faster than they could exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moepress.ranks import Ranks
from moepress.rounding.factor import column_slices
from moepress.rounding.inputs import Inputs
from moepress.rounding.options import Rounding


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


class _Share(NamedTuple):
    """Who sums the statistics of some inputs."""

    owner: int  # the rank that has them in the end
    slices: dict[int, list[slice] | None]  # of the columns, by rank; None: all


class Gathering:
    """Statistics of the inputs of a layer's linears.

    Args:
        ranks: that own the statistics.
        rounding: of the linears.
        corrects: whether the original model's inputs will be given.
    """

    def __init__(self, ranks: Ranks, rounding: Rounding, corrects: bool) -> None:
        self._ranks = ranks
        self._rounding = rounding
        self._corrects = corrects
        self._pending: list[_Rows] = []
        self._shares: dict[str, _Share] = {}
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
        self._shares = self._shares or ranks.agreed(self._divided)
        about: list[list[_About]] = [[] for _ in range(ranks.count)]
        parts: list[list[Tensor]] = [[torch.empty(0, dtype=torch.uint8)] for _ in about]
        for rows in self._pending:
            values = [rows.x] if rows.original is None else [rows.x, rows.original]
            sent = [value.contiguous().view(-1).view(torch.uint8) for value in values]
            for rank in self._shares[rows.name].slices:
                about[rank].append(_About(rows.name, rows.x.shape, tuple(v.dtype for v in values)))
                parts[rank] += sent
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

    def finish(self) -> None:
        """Bring the statistics together on their owners. All ranks call this together."""
        for name, (owner, slices) in self._shares.items():
            for rank, own in slices.items():
                if self._ranks.rank in (owner, rank):
                    for columns in own or ():
                        for sums in self.inputs[name].rows(columns):
                            self._ranks.give_one(sums, rank, owner)
            if self._ranks.rank != owner:
                self.inputs.pop(name, None)

    def _add(self, rows: _Rows) -> None:
        name = rows.name
        if name not in self.inputs:
            features, device = rows.x.shape[-1], rows.x.device
            share = self._shares.get(name)  # None: there is one rank
            own = share.slices[self._ranks.rank] if share else None
            family = self._rounding.family
            self.inputs[name] = Inputs(features, device, family, self._corrects, slices=own)
        self.inputs[name].add(rows.x, rows.original, self._rounding.token_weights(rows.x))

    def _divided(self) -> dict[str, _Share]:
        """Who sums the inputs of each name, and who owns the sums."""
        columns = {rows.name: rows.x.shape[-1] for rows in self._pending}
        in_slices = all(rows.x.device.type == "cpu" for rows in self._pending)
        return divided(columns, self._ranks, in_slices, self._corrects)


def divided(
    columns: Mapping[str, int], ranks: Ranks, in_slices: bool, corrects: bool
) -> dict[str, _Share]:
    """Who sums which statistics, and who owns them.

    Args:
        columns: K of each, by name.
        in_slices: whether all ranks share those that are more than the fair share of one.
        corrects: whether there are corrections beside the Hessians.
    """
    loads = {name: float(count) ** 2 for name, count in columns.items()}
    owners = dict(zip(loads, ranks.owners(list(loads.values())), strict=True))
    fair = sum(loads.values()) / ranks.count
    tasks: list[tuple[str, slice | None, float]] = []
    for name, load in loads.items():
        if not in_slices or load <= fair:
            tasks.append((name, None, load))
            continue
        slices, count = column_slices(columns[name]), columns[name]
        sizes = [(s.stop - s.start) * ((1 + corrects) * count - s.start) for s in slices]
        tasks += [
            (name, own, load * size / sum(sizes)) for own, size in zip(slices, sizes, strict=True)
        ]
    shares: dict[str, _Share] = {}
    for (name, own, _), rank in zip(tasks, ranks.owners([load for *_, load in tasks]), strict=True):
        if own is None:
            shares[name] = _Share(rank, {rank: None})
            continue
        share = shares.setdefault(name, _Share(owners[name], {owners[name]: []}))
        share.slices[rank] = [*(share.slices.get(rank) or ()), own]
    return shares
