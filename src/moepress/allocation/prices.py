"""Prices and weights that turn one hard program into easy ones: its dual variables.

Price. If a byte costs p, items are independent: each takes the column of least cost + p * size. The
price at which all of them together just fit the budget is what a byte is worth there: attention,
shared experts and dense MLPs, few and large beside the routed experts, are bought at it.

Weights. To minimise the loss of the worst source of text,

    min over plans of max_d loss_d  =  max over weights >= 0 of sum 1 of  min over plans of
                                       sum_d weight_d loss_d       (up to the gap of whole numbers)

multiplicative weights find the outer maximum: a source that does badly counts more next time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moepress.allocation.knapsack import Floats, Ints, at

SMALLEST = 1e-200  # price at which only the smallest of equal costs are preferred
HALVINGS = 200  # of an interval of prices: far below what float64 can tell apart
ROUNDS = 40  # of multiplicative weights: worst losses then differ by a per cent or so
STEP = 1.0  # a source worse than the mean by as much as the mean: counts e times as much at first


class Items(NamedTuple):
    """Items that each take one column."""

    costs: Floats  # [I, B]
    sizes: Ints  # [I, B]

    def cheapest(self, price: float) -> Ints:
        """[I] column of least cost + price * size."""
        choice: Ints = (self.costs + price * self.sizes).argmin(axis=1)
        return choice

    def size(self, choice: Ints) -> int:
        return int(at(self.sizes, choice).sum())


def price_at(groups: Sequence[Items], capacity: int) -> float:
    """The lowest price, to a rounding, at which all items together fit into `capacity`.

    Args:
        groups: at the price of infinity they must fit.
    """

    def fits(price: float) -> bool:
        return sum(items.size(items.cheapest(price)) for items in groups) <= capacity

    if fits(SMALLEST):
        return SMALLEST
    low, high = SMALLEST, 1e-30
    while not fits(high):
        low, high = high, high * 1e3
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low) * np.sqrt(high))
        if not low < middle < high:
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class ByOrigin:
    """The same items with a cost for each source of text."""

    costs: Floats  # [D, I, B] loss of the source's tokens, per token of the source
    sizes: Ints  # [I, B]

    def weighed(self, weights: Floats) -> Items:
        return Items(weighed_sum(weights, self.costs), self.sizes)


def weighed_sum(weights: Floats, costs: Floats) -> Floats:
    """Sum over the first axis; infinite (not offered) stays so whatever the weights are."""
    offered = np.isfinite(costs).all(axis=0)
    total = np.tensordot(weights, np.where(offered, costs, 0.0), axes=1)
    return np.asarray(np.where(offered, total, np.inf))


def worst_case_weights(groups: Sequence[ByOrigin], capacity: int) -> Floats:
    """[D] weights of sum 1 under which the plan of least weighed loss has the least worst loss."""
    sources = len(groups[0].costs)
    logs = np.zeros(sources)
    best, best_loss = np.full(sources, 1 / sources), np.inf
    for turn in range(ROUNDS):
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        items = [group.weighed(weights) for group in groups]
        price = price_at(items, capacity)
        losses = np.zeros(sources)
        for group, flat in zip(groups, items, strict=True):
            choice = flat.cheapest(price)
            losses += np.array([at(costs, choice).sum() for costs in group.costs])
        if losses.max() < best_loss:
            best, best_loss = weights, losses.max()
        logs += STEP / np.sqrt(turn + 1) * (losses / (losses.mean() or 1.0) - 1)
    return best
