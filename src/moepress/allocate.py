"""Which expert gets how many bits: the integer program of arXiv:2410.06270, section 3.2.

Every routed expert (or each of its two projections) is an item that takes exactly one of the
offered widths; an expert of 0 bits is left out. With c[i, b] what width b of item i costs in
quality and s[i, b] what it takes of the budget C:

    minimise    sum_i c[i, b_i]     subject to    sum_i s[i, b_i] <= C                (eq. 5)

a multiple-choice knapsack. The paper asks for equality; here it is "at most", because with true
byte sizes hardly any budget can be met to the byte, and because a width that costs more bytes and
more error (rounding is not monotone) is never worth taking just to use up the budget. What is left
over goes to widths that cost nothing: an expert that no calibration token reached measures zero
error at every width, which means unknown, not harmless.

What fits into a budget: budget.py. What c is: objective.py. How the program is solved: knapsack.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moepress.allocation.budget import (
    expert_budget,
    linear_range,
    required_columns,
    tell_of_excess,
    usual_columns,
)
from moepress.allocation.choices import Menu, offered
from moepress.allocation.knapsack import Floats, Ints, at, solve
from moepress.allocation.objective import flat, linear_costs, objective, source_weights
from moepress.allocation.plan import BitAllocation
from moepress.allocation.prices import Items, price_at
from moepress.allocation.random_plan import draw
from moepress.errors import BudgetError, InputError, NumericalError
from moepress.format.codec import LEFT_OUT
from moepress.recipe import Recipe

if TYPE_CHECKING:
    from moepress.costs.scores import ExpertScores

logger = logging.getLogger(__name__)

# What a recipe must have in common with that of the scores: it says what is open, and how stored.
OPEN_FIELDS = (
    "expert_codec", "linear_codec", "linear_bits", "attention_bits", "shared_expert_bits",
    "dense_mlp_bits", "head_bits", "embedding_bits", "sensitivity",
)  # fmt: skip


def allocate(
    scores: ExpertScores, recipe: Recipe | None = None, **changes: object
) -> BitAllocation:
    """Choose the code bits of every routed expert: least predicted loss within the budget.

    A budget above the largest possible is lowered to it, with a warning in the log.

    Args:
        scores: what each width would cost, as `moepress score` measured it.
        recipe: budget, objective (`cost`, `scope`, `per_projection`, exponents) and widths, which
            must be among the measured ones. None: the recipe the scores were measured with.
        changes: fields of the recipe to set, such as bits=2.5.

    Returns:
        The plan. `predicted_loss` is in units of the objective; under "random" and "uniform" it
        is what "error" would count, over the "worst" source the weighed sum that is minimised. It
        cannot be compared between `per_projection` on and off: the errors of two projections add
        up to nearly, not exactly, the error of both.

    Raises:
        InputError: no budget, or scores and recipe do not fit together.
        BudgetError: the budget is too small; names the smallest and the largest possible.
        NumericalError: NaN, infinity or a negative number in the scores.
        MoepressError: HiGHS did not solve the program.
    """
    recipe = (recipe or Recipe.from_dict(scores.recipe)).with_changes(**changes)
    check_inputs(scores, recipe)
    tell_of_excess(scores, recipe)
    menu = Menu.of(scores, recipe)
    weights = source_weights(scores, recipe)
    costs = objective(scores, recipe, weights)
    sizes = menu.code_bits if recipe.bits is not None else menu.nbytes
    capacity = expert_budget(scores, recipe, menu)  # with the linears as small as possible
    linears = choose_linears(scores, recipe, menu, costs, weights, capacity)
    linear_bytes = int(at(scores.linear_bytes, linears).sum())
    if recipe.bits is None:
        capacity -= linear_bytes - linear_range(scores, recipe)[0]
    choice = (
        uniform(recipe, menu, sizes, capacity)
        if recipe.cost == "uniform"
        else choose(recipe, costs, sizes, capacity)
    )
    if menu.widths[0] == LEFT_OUT and not choice.any():
        choice = keep_one(costs, sizes, choice, capacity)
    loss = float(at(costs, choice).sum())
    if recipe.cost != "paper":  # in other units
        loss += float(at(linear_costs(scores, weights), linears).sum())
    expert_bytes = int(at(menu.nbytes, choice).sum())
    total_bytes = scores.fixed_bytes + linear_bytes + expert_bytes
    return BitAllocation(
        layers=scores.layers,
        bits=menu.bits(choice).astype(np.int8),
        linear_bits={
            name: scores.linear_bits[column]
            for name, column in zip(scores.linears, linears.tolist(), strict=True)
        },
        group_size=scores.group_size,
        predicted_loss=loss,
        expert_bytes=expert_bytes,
        total_bytes=total_bytes,
        folder_bytes=total_bytes + scores.file_bytes,
        average_bits=int(at(menu.code_bits, choice).sum()) / menu.total_weights,
        expert_bits_per_weight=expert_bytes * 8 / menu.total_weights,
        bits_per_weight=total_bytes * 8 / (scores.fixed_weights + menu.total_weights),
        recipe=recipe,
        provenance=dict(scores.provenance),
    )


def choose_linears(
    scores: ExpertScores, recipe: Recipe, menu: Menu, costs: Floats, weights: Floats, capacity: int
) -> Ints:
    """[M] column of each open linear's width: by what a byte is worth, or the usual width.

    Args:
        costs: [L, E, P, C] of the experts.
        weights: [D] of the sources of text.
        capacity: of the experts, with the linears as small as possible.
    """
    if recipe.cost != "error" or not len(scores.linears):
        return usual_columns(scores)
    linears = Items(linear_costs(scores, weights), scores.linear_bytes)
    if recipe.bits is not None:
        experts = Items(flat(costs), flat(np.broadcast_to(menu.code_bits, costs.shape)))
        return linears.cheapest(8 * price_at([experts], capacity))
    experts = Items(flat(costs), flat(np.broadcast_to(menu.nbytes, costs.shape)))
    capacity += linear_range(scores, recipe)[0]  # of all together
    price = price_at([experts, linears], capacity)
    least = menu.extremes(menu.nbytes, required_columns(recipe, menu.shape[1]))[0]
    while capacity - linears.size(linears.cheapest(price)) < least:
        price *= 2  # `at_least_one` makes experts larger than the price alone does
    return linears.cheapest(price)


def pareto(scores: ExpertScores, recipe: Recipe, bits: Sequence[float]) -> list[float]:
    """Predicted loss at each average number of code bits."""
    return [plan.predicted_loss for plan in frontier(scores, recipe, bits)]


def frontier(scores: ExpertScores, recipe: Recipe, bits: Sequence[float]) -> list[BitAllocation]:
    """The best plan at each average number of code bits, whatever budget the recipe has."""
    return [allocate(scores, recipe.with_changes(bits=k, bpw=None, size=None)) for k in bits]


def check_inputs(scores: ExpertScores, recipe: Recipe) -> None:
    """Raise InputError, BudgetError or NumericalError if these scores cannot serve this recipe."""
    widths = offered(recipe)
    if recipe.cost == "uniform" and recipe.bits is not None and recipe.bits not in widths:
        raise BudgetError(
            f"No uniform allocation has {recipe.bits} bits: offered are {list(widths)}, the "
            f"smallest is {widths[0]} and the largest {widths[-1]}. Ask for one of them, or use "
            "another cost than 'uniform'."
        )
    missing = sorted(set(widths) - set(scores.bits))
    if missing:
        raise InputError(
            f"expert_bits offers {missing}, but the scores hold {list(scores.bits)} bits. Offer "
            "only these, or score again."
        )
    for name in OPEN_FIELDS:
        measured = scores.recipe.get(name, getattr(recipe, name))
        measured = tuple(measured) if isinstance(measured, list) else measured
        if getattr(recipe, name) != measured:
            raise InputError(
                f"The recipe asks for {name} {getattr(recipe, name)}, but the scores were measured "
                f"with {measured}. Use that, or score again."
            )
    if recipe.group_size != scores.group_size:
        raise InputError(
            f"The recipe asks for group size {recipe.group_size}, but the scores were measured at "
            f"{scores.group_size}. Use that, or score again."
        )
    if scores.total_tokens <= 0 or scores.tokens.size == 0:
        raise InputError(
            f"The scores hold {scores.tokens.size} experts and {scores.total_tokens} tokens. "
            "Expected at least one of each: score again."
        )
    check_linears(scores)
    for name in ("tokens", "routing_weight", "squared_error", "cost", "residual_energy"):
        values = getattr(scores, name)
        wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
        if name == "residual_energy":
            wrong = np.argwhere(~(np.isfinite(values) & (values > 0)))
        if len(wrong):
            row, *rest = wrong[0].tolist()
            expert = f" expert {rest[0]}" if rest else ""
            raise NumericalError(
                f"{name} of layer {scores.layers[row]}{expert} is {values[tuple(wrong[0])]}, "
                f"expected a finite number {'above' if not rest else 'of at least'} 0. Check the "
                "model's weights for NaN and score again."
            )


def keep_one(costs: Floats, sizes: Ints, choice: Ints, capacity: int) -> Ints:
    """A choice [L, E, P] that leaves every expert out, with the best one there is room for."""
    fits = np.broadcast_to(sizes, costs.shape) <= capacity
    fits[..., 0] = False
    best = np.unravel_index(np.where(fits, costs, np.inf).argmin(), costs.shape)
    choice = choice.copy()
    choice[best[:-1]] = best[-1]
    return choice


def tell_of_left_out(scores: ExpertScores, plan: BitAllocation) -> None:
    """Say in the log how many experts a plan leaves out, and how much is known of them."""
    left_out = plan.bits[..., 0] == LEFT_OUT
    if left_out.any():
        logger.warning(
            "%d of %d experts are left out; %d of them no calibration token chose: what they are "
            "for is unknown",
            left_out.sum(), left_out.size, (left_out & (scores.tokens == 0)).sum(),
        )  # fmt: skip


def check_linears(scores: ExpertScores) -> None:
    """Raise NumericalError if a linear has no width to take, or a cost that is none."""
    cost, is_offered = scores.linear_cost, scores.linear_offered
    no_number = np.isnan(cost).any(axis=0) | (cost < 0).any(axis=0)  # [M, W]
    no_size = is_offered & (scores.linear_bytes <= 0)
    bad = (no_number | no_size).sum(axis=1) > 0
    wrong = np.flatnonzero(bad | (is_offered.sum(axis=1) == 0))
    if len(wrong):
        row = int(wrong[0])
        raise NumericalError(
            f"The costs of {scores.linears[row]} are {cost[:, row].tolist()} at "
            f"{scores.linear_bytes[row].tolist()} bytes, expected numbers of at least 0 (infinite "
            "where a width is not offered). Check the model's weights for NaN and score again."
        )


def uniform(recipe: Recipe, menu: Menu, sizes: Ints, capacity: int) -> Ints:
    """Every expert at the largest width that fits. [L, E, P] columns of the menu.

    Raises:
        InputError: `at_least_one` asks for another width too.
    """
    totals = math.prod(menu.shape[:2]) * sizes.sum(axis=0)  # [B]
    column = int((totals <= capacity).sum()) - 1
    if set(recipe.at_least_one) - {menu.widths[column]}:
        raise InputError(
            f"at_least_one asks for {list(recipe.at_least_one)} bits in every layer, which a "
            f"uniform {menu.widths[column]}-bit allocation has not. Set at_least_one to ()."
        )
    return np.full(menu.shape, column)


def choose(recipe: Recipe, costs: Floats, sizes: Ints, capacity: int) -> Ints:
    """Solve for the whole model, or for each layer with an equal share of the budget.

    Args:
        costs: [L, E, P, C].
        sizes: [P, C].
        capacity: of all layers together, in units of sizes.

    Returns:
        [L, E, P] the chosen columns.
    """
    count, experts, items, widths = costs.shape
    required = required_columns(recipe, experts)
    rng = np.random.default_rng(recipe.seed)
    parts = [costs] if recipe.scope == "model" else np.split(costs, count)
    choices = []
    for part in parts:
        layers = len(part)
        flat = part.reshape(-1, widths)
        each = np.tile(sizes, (layers * experts, 1))
        # Items of one layer and projection, which at_least_one counts together.
        groups = np.arange(layers * experts * items).reshape(layers, experts, items)
        members = groups.swapaxes(1, 2).reshape(layers * items, experts)
        share = capacity * layers // count
        choices.append(
            draw(each, share, members, required, rng)
            if recipe.cost == "random"
            else solve(flat, each, share, members, required)
        )
    return np.concatenate(choices).reshape(count, experts, items)
