"""Random plans within a budget: a baseline that measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepress.allocation.arrays import Floats, Ints, Mask, at

DRAWS = 100  # random allocations are drawn, and the largest that fits the budget is taken


def draw(
    sizes: Ints, capacity: int, members: Ints, required: Sequence[int], rng: np.random.Generator
) -> Ints:
    """Draw a random allocation. Those that just meet the budget are about equally likely.

    Giving random costs to the solver would not do: it would still avoid options that are expensive
    for their size, so it would decide the mix of widths. Instead every item draws its option
    independently, with probabilities proportional to exp(-price * size), at the price where the
    expected total size is the budget. All allocations of equal size are then equally likely. Of
    DRAWS such allocations, the largest that fits the budget is taken, or the smallest if none fits.
    Random items then change by one option at a time: down until the budget is met, and up until no
    step up fits.

    Args:
        sizes: [I, C] int64, rising along C.
        capacity: in units of sizes.
        members: [G, M] items of each group.
        required: options that every group has to use at least once.
        rng: random generator; the same state gives the same allocation.

    Returns:
        [I] the chosen options.
    """
    thresholds = _probabilities(sizes, capacity).cumsum(axis=1)[:, :-1]
    drawn = []
    for _ in range(DRAWS):
        choice: Ints = (rng.random((len(sizes), 1)) > thresholds).sum(axis=1)
        free = np.ones(len(sizes), dtype=np.bool_)
        for items in members if required else ():
            held = rng.choice(items, len(required), replace=False)
            choice[held] = required
            free[held] = False
        over = int(at(sizes, choice).sum()) - capacity
        drawn.append((over > 0, abs(over), choice, free))
    _, _, choice, free = min(drawn, key=lambda one: one[:2])
    return _tighten(choice, free, sizes, capacity, rng)


def _tighten(
    choice: Ints, free: Mask, sizes: Ints, capacity: int, rng: np.random.Generator
) -> Ints:
    """Change random free items by one option at a time: down until the budget is met, then up.

    Args:
        free: [I] whether an item may change.
    """
    choice = choice.copy()
    used = int(at(sizes, choice).sum())
    for step in (-1, 1):
        moved = True
        while moved:
            moved = False
            for item in rng.permutation(np.flatnonzero(free)):
                to = choice[item] + step
                if (step < 0 and used <= capacity) or not 0 <= to < sizes.shape[1]:
                    continue
                after = used + int(sizes[item, to] - sizes[item, choice[item]])
                if step < 0 or after <= capacity:
                    choice[item], used, moved = to, after, True
    return choice


def _probabilities(sizes: Ints, capacity: int) -> Floats:
    """[I, C] probabilities proportional to exp(-price * size) whose expected size is the budget."""
    scaled = (sizes - sizes.mean(axis=1, keepdims=True)) / max(float(np.ptp(sizes)), 1.0)

    def at_price(price: float) -> Floats:
        weight = np.exp(-price * scaled - (-price * scaled).max(axis=1, keepdims=True))
        return np.asarray(weight / weight.sum(axis=1, keepdims=True))

    # At `low` all items take the largest option, at `high` the smallest.
    low, high = -1000.0, 1000.0
    for _ in range(60):
        price = (low + high) / 2
        if (at_price(price) * sizes).sum() > capacity:
            low = price
        else:
            high = price
    return at_price(high)
