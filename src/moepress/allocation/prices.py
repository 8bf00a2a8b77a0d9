"""Prices of bytes and weights of texts: dual variables of the allocation's integer program.

Price. If a byte costs p, items are independent: each takes the option of least cost + p * size. The
price at which all items together just fit the budget is the value of a byte at that budget. The
open tensors (attention, shared experts, dense MLPs, embedding and head), few and large compared
with the routed experts, take their widths at this price. If one of them would be larger at a barely
lower price, but does not fit, its bytes can be a good part of the budget: both widths are tried.

Weights. The plan with the least loss on its worst text minimises a weighted loss, up to the
integrality gap. The texts' weights are at least 0, sum to 1, and maximise that minimum:

    min over plans of max_d loss_d  =  max over weights of  min over plans of sum_d weight_d loss_d

Multiplicative weights find the outer maximum: a text with a large loss gets a larger weight in the
next round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moepress.allocation.arrays import LEAST_PRICE, Floats, Ints, at

HALVINGS = 200  # of an interval of prices: more than float64 can resolve
ROUNDS = 40  # of multiplicative weights: the worst loss then varies by about 1 %
STEP = 1.0  # first round: the weight of a text with twice the mean loss is multiplied by e


TURNS = 3  # tensors whose two widths are tried, one after the other
BARELY = 1e-9  # relative


class Items(NamedTuple):
    """Items that each take one of C options."""

    costs: Floats  # [I, C]
    sizes: Ints  # [I, C]

    def cheapest(self, price: float) -> Ints:
        """[I] for each item, the option of least cost + price * size."""
        chosen: Ints = (self.costs + price * self.sizes).argmin(axis=1)
        return chosen

    def size(self, chosen: Ints) -> int:
        return int(at(self.sizes, chosen).sum())

    def cost(self, chosen: Ints) -> float:
        return float(at(self.costs, chosen).sum())

    def with_fixed(self, item: int, option: int) -> Items:
        """The same items, of which one can take only one option."""
        costs = self.costs.copy()
        costs[item] = np.inf
        costs[item, option] = self.costs[item, option]
        return Items(costs, self.sizes)

    @property
    def smallest(self) -> int:
        """Size of the smallest options together; those of infinite cost are not offered."""
        return int(np.where(np.isfinite(self.costs), self.sizes, 2**62).min(axis=1).sum())


def price_at(groups: Sequence[Items], capacity: int) -> float:
    """The lowest price, up to rounding, at which all items together fit into `capacity`.

    Args:
        groups: items; all smallest options together must fit.
    """

    def fits(price: float) -> bool:
        return sum(items.size(items.cheapest(price)) for items in groups) <= capacity

    if fits(LEAST_PRICE):
        return LEAST_PRICE
    low, high = LEAST_PRICE, 1e-30
    while not fits(high):
        low, high = high, high * 1e3
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low) * np.sqrt(high))
        if not low < middle < high:
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def best_of_few(few: Items, many: Items, capacity: int, turns: int = TURNS) -> tuple[float, Ints]:
    """The loss of all items together, and the options of a few that are large, [M].

    Args:
        many: small items, which can use up what the others leave of `capacity`.
        turns: for how many of the few items two options may be tried.
    """
    price = price_at([many, few], capacity)
    chosen = few.cheapest(price)
    best = few.cost(chosen) + many.cost(many.cheapest(price)), chosen
    larger = few.cheapest(price * (1 - BARELY))
    changed = np.flatnonzero(larger != chosen)
    if not turns or not len(changed):
        return best
    item = int(changed[0])
    for option in (chosen[item], larger[item]):
        fixed = few.with_fixed(item, int(option))
        if fixed.smallest + many.smallest <= capacity:
            found = best_of_few(fixed, many, capacity, turns - 1)
            best = min(best, found, key=lambda one: one[0])
    return best


@dataclass(frozen=True)
class ItemsByText:
    """Items with a cost on each of D texts."""

    costs: Floats  # [D, I, C] loss on the text's tokens, per token of the text
    sizes: Ints  # [I, C]

    def weighted(self, weights: Floats) -> Items:
        return Items(weighted_sum(weights, self.costs), self.sizes)


def weighted_sum(weights: Floats, costs: Floats) -> Floats:
    """Sum over d of weights [D] times costs [D, ...]. Infinite costs (not offered) stay so."""
    offered = np.isfinite(costs).all(axis=0)
    total = np.tensordot(weights, np.where(offered, costs, 0.0), axes=1)
    return np.asarray(np.where(offered, total, np.inf))


def worst_case_weights(groups: Sequence[ItemsByText], capacity: int) -> Floats:
    """Weights [D] that sum to 1, one for each text.

    The plan that minimises the weighted loss has the least loss on its worst text. The weights are
    the best of ROUNDS rounds of multiplicative weights.
    """
    texts = len(groups[0].costs)
    logs = np.zeros(texts)
    best, best_loss = np.full(texts, 1 / texts), np.inf
    for turn in range(ROUNDS):
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        items = [group.weighted(weights) for group in groups]
        price = price_at(items, capacity)
        losses = np.zeros(texts)
        for group, flat in zip(groups, items, strict=True):
            chosen = flat.cheapest(price)
            losses += np.array([at(costs, chosen).sum() for costs in group.costs])
        if losses.max() < best_loss:
            best, best_loss = weights, losses.max()
        logs += STEP / np.sqrt(turn + 1) * (losses / (losses.mean() or 1.0) - 1)
    return best
