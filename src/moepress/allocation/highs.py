"""The best choice among candidate options: a small integer program, solved by HiGHS."""

from __future__ import annotations

import logging
import math

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from moepress.allocation.arrays import TOLERANCE, Floats, Ints, Mask, at
from moepress.allocation.program import Program
from moepress.allocation.stdout import stdout_on_stderr
from moepress.errors import MoepressError

logger = logging.getLogger(__name__)

OBJECTIVE_SCALE = 1000.0  # the gap between incumbent and bound, in units of HiGHS's objective
FEW_NODES = 10_000  # of HiGHS's search tree; programs of measured costs need some hundreds
NO_LIMIT = 2**31 - 1
SECONDS = 300.0  # time limit of HiGHS for one program
LARGEST_COEFFICIENT = 1e7  # HiGHS works with absolute tolerances of 1e-6 and 1e-7
PROVEN = 2e-6  # twice the gap at which HiGHS stops


def best_candidates(
    program: Program, reduced: Floats, price: float, gap: float, candidates: Mask
) -> Ints:
    """Solve a knapsack with some options left out.

    Minimises reduced costs + price * (budget left): the loss above the Lagrangian bound. Items that
    are alike in everything share one integer variable per option, the number of them that take it.

    Args:
        reduced: [I, C] reduced costs at `price`.
        gap: loss above the bound of the best choice found so far, above 0.
        candidates: [I, C] the options offered, at least one of each item.

    Returns:
        [I] the best choice among the candidates.

    Raises:
        MoepressError: HiGHS failed, ran out of time, or gave a wrong answer.
    """
    choice: Ints = candidates.argmax(axis=1)
    is_open = candidates.sum(axis=1) > 1
    items = np.flatnonzero(is_open)
    offered = np.where(candidates, reduced, np.inf)[items]
    group = program.group_of()[items]
    alike = np.column_stack([offered, program.sizes[items], group])
    _, first, kind, count = np.unique(
        alike, axis=0, return_index=True, return_inverse=True, return_counts=True
    )  # K kinds of open items
    kinds, options = np.nonzero(np.isfinite(offered[first]))  # [V] one variable each
    variables = len(kinds)
    capacity = program.capacity - int(at(program.sizes, choice)[~is_open].sum())
    sizes = program.sizes[items[first]][kinds, options]
    # The last variable is the budget that is left.
    constraints = [
        LinearConstraint(
            _ones(kinds, np.arange(variables), (len(first), variables + 1)), count, count
        ),
        LinearConstraint(np.append(sizes, 1)[None, :].astype(float), capacity, capacity),
    ]
    for option in program.required:
        covered = (~is_open & (choice == option))[program.members].any(axis=1)  # [G]
        here = np.flatnonzero(options == option)
        cover = _ones(group[first][kinds[here]], here, (len(covered), variables + 1))
        constraints.append(LinearConstraint(cover, 1.0 - covered, np.inf))
    # If the unspent budget is worth more than the gap, the plan cannot beat the incumbent.
    most_room = math.floor(min(gap / price * (1 + TOLERANCE), capacity))
    loss = np.append(offered[first][kinds, options], price if most_room else 0.0)
    taken = _proven_optimum(
        loss * min(OBJECTIVE_SCALE / gap, LARGEST_COEFFICIENT / loss.max()),
        Bounds(0, np.append(count[kinds], most_room)),
        constraints,
    )[:-1]
    if (np.bincount(kinds, taken, len(first)) != count).any():
        raise MoepressError(
            "HiGHS returned no width or several for an item. Expected exactly one: please report."
        )
    # The items of a kind, in order, get the options that were taken for the kind, in order.
    choice[items[np.argsort(kind.ravel(), kind="stable")]] = np.repeat(options, taken)
    if program.room(choice) < 0:
        raise MoepressError(
            f"HiGHS overran the budget by {-program.room(choice)} units: please report."
        )
    logger.debug("HiGHS decided %d items in %d variables", len(items), variables)
    return choice


def _proven_optimum(loss: Floats, bounds: Bounds, constraints: list[LinearConstraint]) -> Ints:
    """The integers of least loss, if HiGHS's own lower bound confirms that they are.

    The first try is without presolve: if HiGHS 1.12 restarts after presolve, it can lose its bound
    and still report "optimal" (HiGHS issue 2783). Only programs of many equal costs need presolve.
    The first try is limited in nodes, not in seconds, so that every machine does the same.
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
            if unproven <= PROVEN + TOLERANCE * abs(result.fun):
                return np.rint(result.x).astype(np.int64)
    raise MoepressError(
        f"HiGHS did not solve the allocation: {len(loss)} variables, at most {SECONDS:.0f} s, says "
        f"'{result.message}' Try a slightly different budget, or scope 'layer'."
    )


def _ones(rows: Ints, columns: Ints, shape: tuple[int, int]) -> csr_array:
    """The sparse matrix of that shape with ones at (rows, columns)."""
    return coo_array((np.ones(len(rows)), (rows, columns)), shape).tocsr()
