"""Allocation: the width of every expert, by the integer program of arXiv:2410.06270, section 3.2.

Every routed expert, or each of its two projections, is an item that takes exactly one of the
offered widths; an expert of 0 bits is left out. With c[i, b] the cost of width b of item i, s[i, b]
its size:

    minimise    sum_i c[i, b_i]     subject to    sum_i s[i, b_i] <= budget           (eq. 5)

This is a multiple-choice knapsack. The paper asks for equality in place of "at most". But hardly
any budget can be met to the byte, and a width with more bytes and a higher cost (rounding is not
monotone) should not be taken only to use up the budget. What is left of the budget goes to larger
widths of equal cost: an expert that no calibration token chose has a measured error of 0 at every
width, but its true error is unknown.

allocation/budget.py defines the budget and s, allocation/objective.py c. allocation/knapsack.py
solves the program.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from moepress.allocation.arrays import Floats, Ints, at
from moepress.allocation.budget import Budget, fallback_options
from moepress.allocation.checks import check_inputs
from moepress.allocation.choices import Choices
from moepress.allocation.knapsack import solve
from moepress.allocation.objective import flat, linear_costs, objective, text_weights
from moepress.allocation.plan import BitAllocation
from moepress.allocation.prices import Items, best_of_few, price_at
from moepress.allocation.random_plan import draw
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.format.codec import LEFT_OUT
from moepress.recipe import Recipe

logger = logging.getLogger(__name__)


def allocate(
    scores: ExpertScores, recipe: Recipe | None = None, **changes: object
) -> BitAllocation:
    """Choose the code bits of every routed expert: least predicted loss within the budget.

    A budget above the largest possible is lowered to it, with a warning in the log.

    Args:
        scores: what each width costs, as `moepress score` measured it.
        recipe: budget, objective (`cost`, `scope`, `per_projection`, exponents) and widths, which
            must be among the measured ones. None: the recipe that the scores were measured with.
        changes: fields of the recipe to set, such as bits=2.5.

    Returns:
        The plan. `predicted_loss` is in units of the objective. With `cost` "random" or "uniform",
        `predicted_loss` is the objective of "error"; with `over` "worst", `predicted_loss` is the
        weighted sum that is minimised. Values of `predicted_loss` with and without `per_projection`
        cannot be compared: the costs of the two projections add up to nearly, not exactly, the cost
        of both.

    Raises:
        InputError: there is no budget, or scores and recipe do not fit together.
        BudgetError: the budget is too small; the message gives the smallest and largest possible.
        NumericalError: a score is negative, NaN or infinite.
        MoepressError: HiGHS did not solve the program.
    """
    recipe = (recipe or Recipe.from_dict(scores.recipe)).with_changes(**changes)
    plan = best_plan(scores, recipe)
    Budget.of(scores, recipe, Choices.of(scores, recipe)).warn_of_excess()
    return plan


def best_plan(scores: ExpertScores, recipe: Recipe) -> BitAllocation:
    """`allocate` without the warning, which a `Request` gave."""
    check_inputs(scores, recipe)
    choices = Choices.of(scores, recipe)
    budget = Budget.of(scores, recipe, choices)
    weights = text_weights(scores, recipe, choices, budget)
    costs = objective(scores, recipe, weights)
    linears = choose_linears(scores, recipe, choices, budget, costs, weights)
    linear_bytes = int(at(scores.linear_bytes, linears).sum())
    capacity = budget.shared_capacity - linear_bytes if budget.in_bytes else budget.capacity
    chosen = (
        uniform(recipe, choices, budget.sizes, capacity)
        if recipe.cost == "uniform"
        else choose(recipe, costs, budget, capacity)
    )
    if choices.widths[0] == LEFT_OUT and not chosen.any():
        chosen = keep_one(costs, budget.sizes, chosen, capacity)
    loss = float(at(costs, chosen).sum())
    if recipe.cost != "paper":  # whose costs have other units
        loss += float(at(linear_costs(scores, weights), linears).sum())
    expert_bytes = int(at(choices.nbytes, chosen).sum())
    total_bytes = scores.fixed_bytes + linear_bytes + expert_bytes
    return BitAllocation(
        layers=scores.layers,
        bits=choices.bits(chosen),
        linear_bits={
            name: scores.linear_bits[option]
            for name, option in zip(scores.linears, linears.tolist(), strict=True)
        },
        group_size=scores.group_size,
        predicted_loss=loss,
        expert_bytes=expert_bytes,
        total_bytes=total_bytes,
        folder_bytes=total_bytes + scores.file_bytes,
        average_bits=int(at(choices.code_bits, chosen).sum()) / choices.total_weights,
        expert_bits_per_weight=expert_bytes * 8 / choices.total_weights,
        bits_per_weight=total_bytes * 8 / (scores.other_weights + choices.total_weights),
        recipe=recipe,
        provenance=dict(scores.provenance),
        scaled_layers=scores.scaled_layers,
    )


def choose_linears(
    scores: ExpertScores,
    recipe: Recipe,
    choices: Choices,
    budget: Budget,
    costs: Floats,
    weights: Floats,
) -> Ints:
    """[M] index of the width of each open tensor: the best at the price of a byte, or its fallback.

    Args:
        costs: [L, E, P, C] of the experts.
        weights: [D] of the texts.
    """
    if recipe.cost != "error" or not len(scores.linears):
        return fallback_options(scores)
    linears = Items(linear_costs(scores, weights), scores.linear_bytes)
    experts = Items(flat(costs), flat(np.broadcast_to(budget.sizes, costs.shape)))
    if not budget.in_bytes:
        price_of_bit = price_at([experts], budget.capacity)
        return linears.cheapest(8 * price_of_bit)  # price of a code bit -> price of a byte
    capacity = budget.shared_capacity
    least = choices.extremes(budget.sizes, budget.required)[0]
    _, chosen = best_of_few(linears, experts, capacity)
    if capacity - linears.size(chosen) >= least:
        return chosen
    price = price_at([experts, linears], capacity)
    while capacity - linears.size(linears.cheapest(price)) < least:
        price *= 2  # `at_least_one` needs more bytes for experts: raise the price until they fit
    return linears.cheapest(price)


def uniform(recipe: Recipe, choices: Choices, sizes: Ints, capacity: int) -> Ints:
    """[L, E, P] options: every expert at the largest width that fits.

    Raises:
        InputError: `at_least_one` asks for another width too.
    """
    totals = math.prod(choices.shape[:2]) * sizes.sum(axis=0)  # [B]
    option = int((totals <= capacity).sum()) - 1
    if set(recipe.at_least_one) - {choices.widths[option]}:
        raise InputError(
            f"at_least_one asks for {list(recipe.at_least_one)} bits in every layer, which a "
            f"uniform {choices.widths[option]}-bit allocation has not. Set at_least_one to ()."
        )
    return np.full(choices.shape, option)


def choose(recipe: Recipe, costs: Floats, budget: Budget, capacity: int) -> Ints:
    """Choose options for the whole model, or for each layer with an equal share of the budget.

    Args:
        costs: [L, E, P, C].
        capacity: of all layers together, in units of the budget's sizes.

    Returns:
        [L, E, P] the chosen options.
    """
    count, experts, items, options = costs.shape
    rng = np.random.default_rng(recipe.seed)
    chosen = []
    for scope in [costs] if recipe.scope == "model" else np.split(costs, count):
        layers = len(scope)
        sizes = np.tile(budget.sizes, (layers * experts, 1))
        # A group is the items of one layer and projection: `at_least_one` holds for each group.
        groups = np.arange(layers * experts * items).reshape(layers, experts, items)
        members = groups.swapaxes(1, 2).reshape(layers * items, experts)
        share = capacity * layers // count
        chosen.append(
            draw(sizes, share, members, budget.required, rng)
            if recipe.cost == "random"
            else solve(scope.reshape(-1, options), sizes, share, members, budget.required)
        )
    return np.concatenate(chosen).reshape(count, experts, items)


def keep_one(costs: Floats, sizes: Ints, chosen: Ints, capacity: int) -> Ints:
    """Options [L, E, P] that leave out every expert except one: the cheapest option that fits."""
    fits = np.broadcast_to(sizes, costs.shape) <= capacity
    fits[..., 0] = False
    best = np.unravel_index(np.where(fits, costs, np.inf).argmin(), costs.shape)
    chosen = chosen.copy()
    chosen[best[:-1]] = best[-1]
    return chosen


def frontier(scores: ExpertScores, recipe: Recipe, bits: Sequence[float]) -> list[BitAllocation]:
    """The best plan at each average number of code bits; the recipe's own budget is ignored."""
    return [allocate(scores, recipe.with_changes(bits=k, bpw=None, size=None)) for k in bits]


def warn_of_left_out(scores: ExpertScores, plan: BitAllocation) -> None:
    """Log how many experts a plan leaves out, and how many of them no token chose."""
    left_out = plan.bits[..., 0] == LEFT_OUT
    if left_out.any():
        logger.warning(
            "%d of %d experts are left out; %d of them no scored token chose: what they are "
            "for is unknown",
            left_out.sum(), left_out.size, (left_out & (scores.tokens == 0)).sum(),
        )  # fmt: skip
