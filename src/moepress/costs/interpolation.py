"""Costs of an expert at all widths, from those at three.

Drawn errors (rounding/noise.py) of two widths differ by d alone, the relative squared error of the
code: the noise is the same. So a cost is a smooth function of d. For small d it grows as d. What
else it depends on is nearly a parabola in d^(1/3): log(cost / d) goes through the costs that were
measured, at the narrowest width, the widest, and the one nearest to their middle. With both
projections rounded, the logarithm of that cost over the sum of the two others does.

Interpolated costs differ from measured ones by less than another draw does
(docs/log.md#noise-widths).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.costs.scores import BOTH
from moepress.format.codec import LEFT_OUT
from moepress.rounding.noise import code_error

POWER = 1 / 3  # of d
NODES = 3  # widths that are measured


@dataclass(frozen=True)
class Interpolation:
    """Widths to measure in place of all that are offered, and the costs of all from theirs."""

    offered: tuple[float, ...]  # [B] rising, 0 among them if experts may be left out
    measured: tuple[float, ...]  # [n] those of `offered` to measure
    errors: Tensor  # [2, B] float64: d of gate_up and of down; empty if all are measured

    @classmethod
    def of_drawn(
        cls, offered: tuple[float, ...], rows: Sequence[int], device: torch.device | str
    ) -> Interpolation:
        """For drawn errors: three widths, and 0 bits if offered, which takes no rounding.

        Args:
            rows: of gate_up and of down.
            device: where the error of a code is measured.
        """
        widths = [bits for bits in offered if bits != LEFT_OUT]
        if len(widths) <= NODES:
            return cls.none(offered)
        errors = torch.ones(len(rows), len(offered), dtype=torch.float64)
        for option, bits in enumerate(offered):
            if bits != LEFT_OUT:
                of_rows = [code_error(bits, count, device) for count in rows]
                errors[:, option] = torch.tensor(of_rows, dtype=torch.float64)
        places = dict(zip(offered, (errors[0] ** POWER).tolist(), strict=True))
        first, *between, last = widths
        center = (places[first] + places[last]) / 2
        middle = min(between, key=lambda bits: abs(places[bits] - center))
        keep = {LEFT_OUT, first, middle, last}
        return cls(offered, tuple(bits for bits in offered if bits in keep), errors)

    @classmethod
    def none(cls, offered: tuple[float, ...]) -> Interpolation:
        """All widths are measured."""
        return cls(offered, offered, torch.empty(0))

    def at_all(self, costs: Tensor) -> Tensor:
        """Costs, or squared errors, [..., 3, B] at all widths, by ROUNDED.

        Args:
            costs: [..., 3, n] float64 at the measured widths, at least 0. Where one is 0, all
                that are interpolated are.
        """
        if self.measured == self.offered:
            return costs
        found = costs.new_zeros(*costs.shape[:-1], len(self.offered))
        options = [self.offered.index(bits) for bits in self.measured]
        found[..., options] = costs
        nodes = [option for option in options if self.offered[option] != LEFT_OUT]
        rest = [option for option in range(len(self.offered)) if option not in options]
        for row, errors in enumerate(self.errors):
            found[..., row, rest] = _between(found[..., row, :], errors, errors, nodes)[..., rest]
        alone = found[..., :BOTH, :].sum(-2)
        both = _between(found[..., BOTH, :], alone, self.errors[0], nodes)
        found[..., BOTH, rest] = both[..., rest]
        return found


def _between(costs: Tensor, like: Tensor, errors: Tensor, nodes: Sequence[int]) -> Tensor:
    """Costs [..., B], such that log(costs / like) is the parabola through those at the nodes.

    Args:
        costs: [..., B], of which those at the nodes are read.
        like: [..., B] or [B].
        errors: [B] d.
        nodes: indices of three widths.
    """
    ratio = costs[..., nodes] / like[..., nodes]
    positive = torch.isfinite(ratio) & (ratio > 0)
    place = errors**POWER
    logarithm = torch.where(positive, ratio, 1.0).log() @ _parabola(place[list(nodes)], place)
    return torch.where(positive.all(-1, keepdim=True), like * logarithm.exp(), 0.0)


def _parabola(nodes: Tensor, places: Tensor) -> Tensor:
    """Weights [3, B] of the values at three nodes in the parabola through them, at each place."""
    weights = torch.ones(len(nodes), len(places), dtype=places.dtype)
    for i, node in enumerate(nodes):
        for j, other in enumerate(nodes):
            if j != i:
                weights[i] *= (places - other) / (node - other)
    return weights
