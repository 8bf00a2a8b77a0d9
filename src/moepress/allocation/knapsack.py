"""The multiple-choice knapsack, solved exactly: one column for each item, within a capacity.

`solve` is exact. In four steps:

1. Lagrange. At a price p per unit of budget, items are independent: each takes the width of least
   c + p s. The sum of these minima less p C is a lower bound on every allocation, whatever p >= 0;
   the best p, found by bisection, gives the bound of the linear relaxation.
2. Incumbent. The allocations just above and just below that price differ in a few items: as many
   of them are changed as the budget allows.
3. Margins. How much the bound rises if item i takes width b: (c + p s)[i, b] less the item's least
   c + p s. A width whose margin exceeds the gap between incumbent and bound is in no better
   allocation.
4. HiGHS chooses among the widths of the smallest margins, minimising margins + p * (what is left
   of the budget): the loss above the bound. That gives a better incumbent, hence a smaller gap;
   widths are added until all that are left out exceed it. The objective is scaled so that the gap
   is OBJECTIVE_SCALE: HiGHS never has to see a small difference of large numbers, however many
   orders of magnitude the costs span. It stops within 1e-6, so a plan is proven optimal to
   1e-6 / OBJECTIVE_SCALE of a gap that is itself a small part of the loss of one item.
   Items alike in everything become one integer variable per width, which is what keeps ties (and
   models of random weights) from taking for ever.

`at_least_one` (the paper: one 2-bit and one 3-bit expert in each layer) needs distinct items to
stand for each listed width. At a given price the cheapest of them are an assignment problem, so the
bound stays exact with it. Where projections are items, it holds for the gate_up projections of a
layer and for its down projections, each by themselves.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import coo_array, csr_array

from moepress.errors import MoepressError

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FIRST_CORE = 100  # columns, beside the cheapest of each item, that HiGHS is first asked about
LEAST_PRICE = 1e-200  # beside the largest cost: of columns as cheap, the smallest is taken
OBJECTIVE_SCALE = 1000.0  # what HiGHS sees of the distance between incumbent and bound
FEW_NODES = 10_000  # of HiGHS's search tree; programs of measured costs need some hundreds
NO_LIMIT = 2**31 - 1
SECONDS = 300.0  # HiGHS may think this long about one program
LARGEST_COEFFICIENT = 1e7  # HiGHS works with absolute tolerances of 1e-6 and 1e-7
PROVEN = 2e-6  # twice the gap at which HiGHS stops
ROUNDING = 1e-12  # relative: 2.1 bits of 10 weights are 21, whatever 2.1 is in binary


@dataclass(frozen=True)
class _Knapsack:
    """The program in units of its own: excess costs within [0, 1], excess sizes in their gcd."""

    excess: Floats  # [I, B] cost above the item's cheapest width
    sizes: Ints  # [I, B] size above the item's smallest width
    capacity: int
    members: Ints  # [G, M] items of each group
    required: tuple[int, ...]  # columns that each group uses at least once

    @classmethod
    def of(
        cls, costs: Floats, sizes: Ints, capacity: int, members: Ints, required: Sequence[int]
    ) -> _Knapsack:
        excess = costs - costs.min(axis=1, keepdims=True)
        smallest = sizes.min(axis=1, keepdims=True)
        unit = int(np.gcd.reduce(sizes - smallest, axis=None)) or 1
        return cls(
            excess / (excess.max() or 1.0),
            (sizes - smallest) // unit,
            (capacity - int(smallest.sum())) // unit,
            members,
            tuple(required),
        )

    def room(self, choice: Ints) -> int:
        """What a choice leaves of the budget."""
        return self.capacity - int(at(self.sizes, choice).sum())

    def group_of(self) -> Ints:
        """[I] group of each item; 0 where groups do not matter."""
        groups = np.zeros(len(self.sizes), dtype=np.int64)
        if self.required:
            groups[self.members] = np.arange(len(self.members))[:, None]
        return groups

    def at_price(self, price: float) -> tuple[Ints, Floats]:
        """The cheapest choice [I] if budget costs `price` a unit, and reduced costs [I, B]."""
        total = self.excess + price * self.sizes
        choice = total.argmin(axis=1)
        reduced = total - at(total, choice)[:, None]  # a minimum along so short an axis is slow
        for items in self.members if self.required else ():
            offers = reduced[items][:, list(self.required)]
            rows, columns = linear_sum_assignment(offers)
            choice[items[rows]] = np.array(self.required)[columns]
        return choice, reduced

    def choice_at(self, price: float) -> Ints:
        """The choice of `at_price` alone, in less time."""
        if self.required:
            return self.at_price(price)[0]
        return np.asarray((self.excess + price * self.sizes).argmin(axis=1))

    def representatives(self, choice: Ints) -> Mask:
        """[I] one item for each group and required column: these must not change."""
        held = np.zeros(len(choice), dtype=np.bool_)
        for column in self.required:
            found = choice[self.members] == column
            held[self.members[np.arange(len(found)), found.argmax(axis=1)]] = True
        return held

    def cover_cost(self, reduced: Floats, left_out: int | None = None) -> Floats:
        """[G] how much the bound rises because each group uses its required columns."""
        columns = [c for c in self.required if c != left_out]
        rises = np.zeros(len(self.members))
        for group, items in enumerate(self.members if columns else ()):
            offers = reduced[items][:, columns]
            rises[group] = offers[linear_sum_assignment(offers)].sum()
        return rises


def solve(
    costs: Floats,
    sizes: Ints,
    capacity: int,
    members: Ints | None = None,
    required: Sequence[int] = (),
) -> Ints:
    """Choose one column for each item: least sum of costs, sum of sizes at most `capacity`. Exact.

    Args:
        costs: [I, B] finite float64.
        sizes: [I, B] int64, at least 0.
        capacity: in units of sizes; some choice must fit.
        members: [G, M] items of each group, needed with `required`.
        required: columns that every group has to use at least once.

    Returns:
        [I] the chosen columns; the same for the same input. Room that is left is spent on columns
        of equal cost.

    Raises:
        MoepressError: HiGHS failed or ran out of time.
    """
    groups = np.empty((0, 0), dtype=np.int64) if members is None else members
    problem = _Knapsack.of(costs, sizes, capacity, groups, required)
    return _spend_freely(problem, _solve(problem))


def _solve(problem: _Knapsack) -> Ints:
    choice = problem.choice_at(LEAST_PRICE)
    if problem.room(choice) >= 0:
        return choice  # the budget does not bind
    price, below, above = _best_price(problem)
    incumbent = _towards(problem, above, below)
    _, reduced = problem.at_price(price)
    rises = problem.cover_cost(reduced)
    bound = rises.sum() * (1 - ROUNDING)  # of two sums, one may be rounded up and the other down
    gap = _loss(problem, incumbent, reduced, price) - bound
    margin = _margin(problem, reduced, rises)
    core = FIRST_CORE
    while gap > 0:
        threshold = min(gap, _smallest(margin, len(margin) + core))
        candidates = margin <= threshold
        candidates[np.arange(len(incumbent)), incumbent] = True
        found = _highs(problem, reduced, price, gap, candidates)
        found_gap = _loss(problem, found, reduced, price) - bound
        if found_gap < gap:
            incumbent, gap = found, found_gap
        if gap <= threshold:
            break  # no column left out could improve on it
        core = 4 * max(core, int(candidates.sum()) - len(margin))
    return incumbent


def _best_price(problem: _Knapsack) -> tuple[float, Ints, Ints]:
    """The price at which the budget is just met, and the choices just below and just above it."""
    high = 1.0
    while problem.room(problem.choice_at(high)) < 0:
        high *= 2
    low = high
    while problem.room(problem.choice_at(low)) >= 0:
        high, low = low, max(low / 2, LEAST_PRICE)
    while low < (middle := (low + high) / 2) < high:
        if problem.room(problem.choice_at(middle)) >= 0:
            high = middle
        else:
            low = middle
    return high, problem.choice_at(low), problem.choice_at(high)


def _towards(problem: _Knapsack, start: Ints, end: Ints) -> Ints:
    """`start` with as many of its items as fit, first ones first, changed to what `end` has."""
    change = at(problem.sizes, end) - at(problem.sizes, start)
    change[problem.representatives(start)] = 0
    items = np.flatnonzero(change)
    fits = np.cumsum(change[items]) <= problem.room(start)
    items = items[: len(items) if fits.all() else int(fits.argmin())]
    choice = start.copy()
    choice[items] = end[items]
    return choice


def _loss(problem: _Knapsack, choice: Ints, reduced: Floats, price: float) -> float:
    """Cost of a choice above the Lagrangian bound without required columns; no cancellation."""
    return float(at(reduced, choice).sum() + price * problem.room(choice))


def _margin(problem: _Knapsack, reduced: Floats, rises: Floats) -> Floats:
    """[I, B] how much the bound rises if an item takes a column.

    Its reduced cost; but a required column serves its group too, which saves what the group
    has to pay for that column anyway.
    """
    margin = reduced.copy()
    for column in problem.required:
        saved = rises - problem.cover_cost(reduced, left_out=column)  # [G]
        margin[problem.members, column] -= saved[:, None]
    return margin


def _smallest(values: Floats, count: int) -> float:
    """The count-th smallest value; infinity if there are no more than that."""
    flat = values.ravel()
    return float(np.partition(flat, count - 1)[count - 1]) if count < len(flat) else math.inf


def _highs(problem: _Knapsack, reduced: Floats, price: float, gap: float, candidates: Mask) -> Ints:
    """HiGHS on the items that still have a choice; equal items are one integer variable a column.

    Returns:
        [I] the best choice among the candidates.
    """
    choice: Ints = candidates.argmax(axis=1)
    is_open = candidates.sum(axis=1) > 1
    items = np.flatnonzero(is_open)
    offered = np.where(candidates, reduced, np.inf)[items]
    group = problem.group_of()[items]
    alike = np.column_stack([offered, problem.sizes[items], group])
    _, first, kind, count = np.unique(
        alike, axis=0, return_index=True, return_inverse=True, return_counts=True
    )  # K kinds of open items
    rows, columns = np.nonzero(np.isfinite(offered[first]))  # [V] one variable each
    variables = len(rows)
    capacity = problem.capacity - int(at(problem.sizes, choice)[~is_open].sum())
    sizes = problem.sizes[items[first]][rows, columns]
    # The last variable is the room that is left.
    constraints = [
        LinearConstraint(
            _ones(rows, np.arange(variables), (len(first), variables + 1)), count, count
        ),
        LinearConstraint(np.append(sizes, 1)[None, :].astype(float), capacity, capacity),
    ]
    for column in problem.required:
        covered = (~is_open & (choice == column))[problem.members].any(axis=1)  # [G]
        here = np.flatnonzero(columns == column)
        cover = _ones(group[first][rows[here]], here, (len(covered), variables + 1))
        constraints.append(LinearConstraint(cover, 1.0 - covered, np.inf))
    # Room that costs more than the gap is in no better choice.
    most_room = math.floor(min(gap / price * (1 + ROUNDING), capacity))
    loss = np.append(offered[first][rows, columns], price if most_room else 0.0)
    taken = _proven_optimum(
        loss * min(OBJECTIVE_SCALE / gap, LARGEST_COEFFICIENT / loss.max()),
        Bounds(0, np.append(count[rows], most_room)),
        constraints,
    )[:-1]
    if (np.bincount(rows, taken, len(first)) != count).any():
        raise MoepressError(
            "HiGHS returned no width or several for an item. Expected exactly one: please report."
        )
    # Items of one kind, in order, get the widths of that kind, in order.
    choice[items[np.argsort(kind.ravel(), kind="stable")]] = np.repeat(columns, taken)
    if problem.room(choice) < 0:
        raise MoepressError(
            f"HiGHS overran the budget by {-problem.room(choice)} units: please report."
        )
    logger.debug("HiGHS decided %d items in %d variables", len(items), variables)
    return choice


def _proven_optimum(loss: Floats, bounds: Bounds, constraints: list[LinearConstraint]) -> Ints:
    """The integers of least loss, where HiGHS's lower bound says so too.

    Without presolve first: when HiGHS 1.12 restarts after presolve it can lose its bound and still
    say "optimal" (its issue 2783). Only programs of many equal costs need presolve. The first try
    is limited in nodes, not seconds: the same on any machine.
    """
    for presolve, nodes in ((False, FEW_NODES), (True, NO_LIMIT)):
        with stdout_on_stderr():
            result = milp(
                loss,
                integrality=np.ones(len(loss), dtype=np.int64),
                bounds=bounds,
                constraints=constraints,
                options={
                    "mip_rel_gap": 0.0,
                    "time_limit": SECONDS,
                    "node_limit": nodes,
                    "presolve": presolve,
                },
            )
        if result.status == 0 and result.x is not None:
            unproven = abs(result.fun - result.mip_dual_bound)
            if unproven <= PROVEN + ROUNDING * abs(result.fun):
                return np.rint(result.x).astype(np.int64)
    raise MoepressError(
        f"HiGHS did not solve the allocation: {len(loss)} variables, at most {SECONDS:.0f} s, says "
        f"'{result.message}' Try a slightly different budget, or scope 'layer'."
    )


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Within the block, what C code prints goes to stderr: stdout is for results.

    HiGHS 1.12 now and then prints a line of its own, whatever it is told.
    """
    try:
        kept, printed = os.dup(1), ctypes.CDLL(None)  # all that the process has loaded: libc
    except (OSError, TypeError):  # stdout is closed, or there is no such thing here (Windows)
        yield
        return
    try:
        printed.fflush(None)
        os.dup2(2, 1)
        yield
    finally:
        printed.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _ones(rows: Ints, columns: Ints, shape: tuple[int, int]) -> csr_array:
    """The matrix [shape] of zeros with a one at each of these places."""
    return coo_array((np.ones(len(rows)), (rows, columns)), shape).tocsr()


def _spend_freely(problem: _Knapsack, choice: Ints) -> Ints:
    """Spend what is left of the budget on larger widths of equal cost, smallest steps first."""
    choice = choice.copy()
    held = problem.representatives(choice)
    never = np.iinfo(np.int64).max
    while True:
        room = problem.room(choice)
        extra = problem.sizes - at(problem.sizes, choice)[:, None]
        equal = problem.excess == at(problem.excess, choice)[:, None]
        step = np.where(equal & (extra > 0) & (extra <= room) & ~held[:, None], extra, never)
        smallest = step.min(axis=1)
        items = np.argsort(smallest, kind="stable")[: int((smallest < never).sum())]
        if not len(items):
            return choice
        items = items[np.cumsum(smallest[items]) <= room]
        choice[items] = step[items].argmin(axis=1)


def at(table: npt.NDArray[Any], choice: Ints) -> npt.NDArray[Any]:
    """table[..., choice] along its last axis; [P, B] tables serve all layers and experts."""
    full = np.broadcast_to(table, (*choice.shape, table.shape[-1]))
    return np.take_along_axis(full, choice[..., None], axis=-1)[..., 0]
