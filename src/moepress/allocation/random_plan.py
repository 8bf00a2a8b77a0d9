"""A fair random allocation, to compare with: what a budget keeps when nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepress.allocation.knapsack import Floats, Ints, Mask, at

DRAWS = 100  # random allocations of which the one nearest below the budget is taken


def draw(
    sizes: Ints, capacity: int, members: Ints, required: Sequence[int], rng: np.random.Generator
) -> Ints:
    """A fair random allocation: each one that just meets the budget is (nearly) as likely.

    Random costs given to the solver would not do: it would still avoid what is expensive for its
    size, so the mix of widths would be the solver's. Instead every item draws its width alone, with
    chances proportional to exp(-price * size), at the price where the expected size is the budget:
    all allocations of one size are then equally likely. Of DRAWS such allocations, the largest that
    fits is taken. What it misses the budget by is made up for by single steps of random items,
    until no step up fits.

    Args:
        sizes: [I, B] int64, rising along B.
        capacity: in units of sizes.
        members: [G, M] items of each group.
        required: columns that every group has to use at least once.
        rng: source of chance; the same state gives the same allocation.

    Returns:
        [I] the chosen columns.
    """
    ends = _chances(sizes, capacity).cumsum(axis=1)[:, :-1]
    drawn = []
    for _ in range(DRAWS):
        choice: Ints = (rng.random((len(sizes), 1)) > ends).sum(axis=1)
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
    """Single steps of random free items: down until the budget is met, up while one fits."""
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


def _chances(sizes: Ints, capacity: int) -> Floats:
    """[I, B] chances proportional to exp(-price * size) whose expected size is the budget."""
    scaled = (sizes - sizes.mean(axis=1, keepdims=True)) / max(float(np.ptp(sizes)), 1.0)

    def chances(price: float) -> Floats:
        weight = np.exp(-price * scaled - (-price * scaled).max(axis=1, keepdims=True))
        return np.asarray(weight / weight.sum(axis=1, keepdims=True))

    low, high = -1000.0, 1000.0  # where all items take one width
    for _ in range(60):
        price = (low + high) / 2
        if (chances(price) * sizes).sum() > capacity:
            low = price
        else:
            high = price
    return chances(high)
