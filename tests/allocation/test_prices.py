"""Prices, and weights of texts, against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moepress.allocation.arrays import at
from moepress.allocation.prices import Items, ItemsByText, price_at, worst_case_weights


def items(seed: int, count: int = 5, columns: int = 3) -> Items:
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.lognormal(0, 2, (count, columns)), axis=1)[:, ::-1]
    return Items(costs, np.cumsum(rng.integers(1, 9, (count, columns)), axis=1))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_at_its_price_items_are_the_best_of_their_size(seed: int, share: float) -> None:
    """The oracle: every choice. None of the same size, or smaller, costs less."""
    first, second = items(seed), items(seed + 100, columns=2)
    low, high = (
        sum(int(f(group.sizes, axis=1).sum()) for group in (first, second))
        for f in (np.min, np.max)
    )
    capacity = round(low + share * (high - low))
    price = price_at([first, second], capacity)
    chosen = [group.cheapest(price) for group in (first, second)]
    size = sum(group.size(c) for group, c in zip((first, second), chosen, strict=True))
    cost = sum(at(g.costs, c).sum() for g, c in zip((first, second), chosen, strict=True))
    assert size <= capacity
    least = min(
        at(first.costs, a).sum() + at(second.costs, b).sum()
        for a in map(np.array, itertools.product(range(3), repeat=5))
        for b in map(np.array, itertools.product(range(2), repeat=5))
        if first.size(a) + second.size(b) <= size
    )
    assert cost == pytest.approx(least, rel=1e-9)
    if price > 1e-100:  # 1e-9 is far above the rounding of a price: at a lower one they do not fit
        lower = price * (1 - 1e-9)
        assert sum(g.size(g.cheapest(lower)) for g in (first, second)) > capacity


def test_the_worst_text_is_helped_most() -> None:
    """Two texts need different items large. With equal weights the text of the larger loss wins."""
    rng = np.random.default_rng(0)
    mine = rng.lognormal(0, 1, (2, 40, 1)) * np.array([9.0, 3.0, 1.0])
    mine[0] *= 5  # the first text loses more
    mine[0, :20] *= 3
    mine[1, 20:] *= 3
    group = ItemsByText(mine, np.tile([1, 2, 3], (40, 1)))
    capacity = 80

    def losses(weights: np.ndarray) -> np.ndarray:
        flat = group.weighted(weights)
        choice = flat.cheapest(price_at([flat], capacity))
        return np.array([at(costs, choice).sum() for costs in mine])

    weights = worst_case_weights([group], capacity)
    assert weights.sum() == pytest.approx(1)
    grid = [losses(np.array([w, 1 - w])).max() for w in np.linspace(0, 1, 201)]
    assert losses(weights).max() <= min(grid) * 1.02
    assert losses(weights).max() < losses(np.array([0.5, 0.5])).max()
