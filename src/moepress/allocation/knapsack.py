"""The multiple-choice knapsack, solved exactly: one option for each item, within a capacity.

`solve` is exact. It works in four steps:

1. Lagrangian bound. At a price p >= 0 per unit of budget items are independent: each takes the
   option of least c + p s, c its cost and s its size. The sum of these minima, less p times the
   capacity, is a lower bound for all choices. The best p, found by bisection, gives the bound of
   the linear relaxation.
2. Incumbent. The choices just above and just below that price differ in a few items. From the one
   that fits, as many of these items as the budget allows are changed to the other.
3. Margins. The margin of option b of item i is how much the bound rises if the item takes it:
   (c + p s)[i, b] less the item's least c + p s. An option whose margin exceeds the gap between
   incumbent and bound cannot be in a better choice.
4. HiGHS chooses among the options of the smallest margins (highs.py). Its objective is
   margins + p * (what is left of the budget), the loss above the bound. That gives a better
   incumbent, hence a smaller gap. Options are added until the margins of all others exceed the gap.
   The objective is scaled so that the gap is OBJECTIVE_SCALE: HiGHS never has to resolve a small
   difference of large numbers, however many orders of magnitude the costs span. It stops within
   1e-6, so a plan is proven optimal to 1e-6 / OBJECTIVE_SCALE of the gap, which is itself a small
   share of the loss of one item. Items that are alike in everything become one integer variable per
   option. Otherwise programs with many ties (models of random weights) would take far too long.

`at_least_one` (in the paper: one 2-bit and one 3-bit expert in each layer) requires that every
group of items uses certain options, each with a different item. At a given price the cheapest such
items are an assignment problem, so the bound stays exact. If projections are items, the gate_up
projections of a layer are one group and its down projections another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moepress.allocation.arrays import LEAST_PRICE, TOLERANCE, Floats, Ints, at
from moepress.allocation.highs import best_candidates
from moepress.allocation.program import Program

FIRST_CORE = 100  # options that HiGHS is given first, in addition to the cheapest of each item


def solve(
    costs: Floats,
    sizes: Ints,
    capacity: int,
    members: Ints | None = None,
    required: Sequence[int] = (),
) -> Ints:
    """Choose one option for each item: least sum of costs, sum of sizes at most `capacity`. Exact.

    Args:
        costs: [I, C] finite float64.
        sizes: [I, C] int64, at least 0.
        capacity: in units of sizes; some choice must fit.
        members: [G, M] items of each group, needed with `required`.
        required: options that every group has to use at least once.

    Returns:
        [I] the chosen options; the same for the same input. What is left of the budget is spent on
        larger options of equal cost.

    Raises:
        MoepressError: HiGHS failed or ran out of time.
    """
    groups = np.empty((0, 0), dtype=np.int64) if members is None else members
    program = Program.of(costs, sizes, capacity, groups, required)
    return _spend_freely(program, _solve(program))


def _solve(program: Program) -> Ints:
    choice = program.choice_at(LEAST_PRICE)
    if program.room(choice) >= 0:
        return choice  # the budget does not bind
    price, below, above = _best_price(program)
    incumbent = _towards(program, above, below)
    _, reduced = program.at_price(price)
    rises = program.cover_cost(reduced)
    bound = rises.sum() * (1 - TOLERANCE)  # of two sums, one may be rounded up and the other down
    gap = _loss(program, incumbent, reduced, price) - bound
    margin = _margin(program, reduced, rises)
    core = FIRST_CORE
    while gap > 0:
        threshold = min(gap, _smallest(margin, len(margin) + core))
        candidates = margin <= threshold
        candidates[np.arange(len(incumbent)), incumbent] = True
        found = best_candidates(program, reduced, price, gap, candidates)
        found_gap = _loss(program, found, reduced, price) - bound
        if found_gap < gap:
            incumbent, gap = found, found_gap
        if gap <= threshold:
            break  # no other option could improve on the incumbent
        core = 4 * max(core, int(candidates.sum()) - len(margin))
    return incumbent


def _best_price(program: Program) -> tuple[float, Ints, Ints]:
    """The price at which the budget is just met, and the choices just below and just above it."""
    high = 1.0
    while program.room(program.choice_at(high)) < 0:
        high *= 2
    low = high
    while program.room(program.choice_at(low)) >= 0:
        high, low = low, max(low / 2, LEAST_PRICE)
    while low < (middle := (low + high) / 2) < high:
        if program.room(program.choice_at(middle)) >= 0:
            high = middle
        else:
            low = middle
    return high, program.choice_at(low), program.choice_at(high)


def _towards(program: Program, start: Ints, end: Ints) -> Ints:
    """`start` with as many items as fit, in their order, changed to what `end` has."""
    change = at(program.sizes, end) - at(program.sizes, start)
    change[program.representatives(start)] = 0
    items = np.flatnonzero(change)
    fits = np.cumsum(change[items]) <= program.room(start)
    items = items[: len(items) if fits.all() else int(fits.argmin())]
    choice = start.copy()
    choice[items] = end[items]
    return choice


def _loss(program: Program, choice: Ints, reduced: Floats, price: float) -> float:
    """Loss of a choice above the Lagrangian bound without required options.

    Summed from reduced costs, so no large numbers cancel.
    """
    return float(at(reduced, choice).sum() + price * program.room(choice))


def _margin(program: Program, reduced: Floats, rises: Floats) -> Floats:
    """[I, C] how much the bound rises if an item takes an option.

    That is the option's reduced cost. If the option is required, less what the item's group saves,
    which otherwise has to pay for the option with another item.
    """
    margin = reduced.copy()
    for option in program.required:
        saved = rises - program.cover_cost(reduced, without=option)  # [G]
        margin[program.members, option] -= saved[:, None]
    return margin


def _smallest(values: Floats, count: int) -> float:
    """The count-th smallest value; infinity if there are no more than `count` values."""
    flat = values.ravel()
    return float(np.partition(flat, count - 1)[count - 1]) if count < len(flat) else math.inf


def _spend_freely(program: Program, choice: Ints) -> Ints:
    """Spend what is left of the budget on larger options of equal cost, smallest steps first."""
    choice = choice.copy()
    held = program.representatives(choice)
    never = np.iinfo(np.int64).max
    while True:
        room = program.room(choice)
        extra = program.sizes - at(program.sizes, choice)[:, None]
        equal = program.excess == at(program.excess, choice)[:, None]
        step = np.where(equal & (extra > 0) & (extra <= room) & ~held[:, None], extra, never)
        smallest = step.min(axis=1)
        items = np.argsort(smallest, kind="stable")[: int((smallest < never).sum())]
        if not len(items):
            return choice
        items = items[np.cumsum(smallest[items]) <= room]
        choice[items] = step[items].argmin(axis=1)
