"""What a budget is, and what fits into it: sizes of every choice, in code bits and in stored bytes.

Three units say the same: average code bits of the routed experts (the paper's k), stored bits per
weight of the whole model, bytes of the folder. The first counts the experts alone; under the others
all tensors compete.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moepress.allocation.choices import Menu, offered
from moepress.allocation.knapsack import ROUNDING, Ints, at
from moepress.errors import BudgetError, InputError
from moepress.recipe import Recipe, usual_width

if TYPE_CHECKING:
    from moepress.costs.scores import ExpertScores

logger = logging.getLogger(__name__)


class BudgetRange(NamedTuple):
    """Smallest and largest budget that makes a difference, in each unit."""

    bits: tuple[float, float]  # average code bits of the routed experts
    bpw: tuple[float, float]  # stored bits per weight of the whole model
    size: tuple[int, int]  # bytes of the folder


def budget_range(scores: ExpertScores, recipe: Recipe) -> BudgetRange:
    """The smallest and the largest allocation that the recipe admits, in each unit of a budget."""
    menu = Menu.of(scores, recipe)
    required = required_columns(recipe, menu.shape[1])
    low_bits, high_bits = menu.extremes(menu.code_bits, required)
    low, high = (
        scores.fixed_bytes + linears + experts
        for linears, experts in zip(
            linear_range(scores, recipe), menu.extremes(menu.nbytes, required), strict=True
        )
    )
    weights = scores.fixed_weights + menu.total_weights
    return BudgetRange(
        bits=(low_bits / menu.total_weights, high_bits / menu.total_weights),
        bpw=(low * 8 / weights, high * 8 / weights),
        size=(scores.file_bytes + low, scores.file_bytes + high),
    )


def linear_range(scores: ExpertScores, recipe: Recipe) -> tuple[int, int]:
    """Smallest and largest stored bytes of all tensors left open but the experts."""
    if recipe.cost != "error":
        usual = int(at(scores.linear_bytes, usual_columns(scores)).sum())
        return usual, usual
    low = np.where(scores.linear_offered, scores.linear_bytes, 2**62).min(axis=1, initial=2**62)
    high = np.where(scores.linear_offered, scores.linear_bytes, 0).max(axis=1, initial=0)
    return int(low.sum()), int(high.sum())


def usual_columns(scores: ExpertScores) -> Ints:
    """[M] the column of the usual width of each linear."""
    bits = scores.linear_bits
    usual = [
        usual_width([b for b, is_offered in zip(bits, row, strict=True) if is_offered])
        for row in scores.linear_offered.tolist()
    ]
    return np.array([bits.index(width) for width in usual], dtype=np.int64)


def asked_budget(scores: ExpertScores, recipe: Recipe) -> tuple[str, float, float, float]:
    """Unit and size of the recipe's budget; the smallest and the largest possible.

    Raises:
        InputError: no budget is set.
    """
    possible = budget_range(scores, recipe)._asdict()
    unit = next((unit for unit in possible if getattr(recipe, unit) is not None), None)
    if unit is None:
        raise InputError("No budget. Set one of bits (say 2.5), bpw, or size.")
    return unit, getattr(recipe, unit), *possible[unit]


def tell_of_excess(scores: ExpertScores, recipe: Recipe) -> None:
    """Say in the log that a budget is above the largest possible, which is used."""
    unit, asked, _, high = asked_budget(scores, recipe)
    if asked > high:
        logger.warning(
            "%s %g is above the largest possible, %s: that is used", unit, asked, _down(high)
        )


def expert_budget(scores: ExpertScores, recipe: Recipe, menu: Menu) -> int:
    """What routed experts may use: code bits under a budget of `bits`, bytes under the others.

    Tensors left open beside them are counted as small as possible.

    Raises:
        InputError: no budget is set.
        BudgetError: it is below the smallest possible.
    """
    unit, asked, low, high = asked_budget(scores, recipe)
    budget = min(asked, high)
    if unit == "bits":
        capacity = math.floor(budget * menu.total_weights * (1 + ROUNDING))
    elif unit == "bpw":
        weights = scores.fixed_weights + menu.total_weights
        capacity = math.floor(budget * weights / 8 * (1 + ROUNDING)) - scores.fixed_bytes
    else:
        capacity = math.floor(budget) - scores.fixed_bytes - scores.file_bytes
    if unit != "bits":
        capacity -= linear_range(scores, recipe)[0]
    sizes = menu.code_bits if unit == "bits" else menu.nbytes
    if capacity < menu.extremes(sizes, required_columns(recipe, menu.shape[1]))[0]:
        raise BudgetError(
            f"{unit} {asked} is impossible: with expert_bits {list(offered(recipe))} and group "
            f"size {scores.group_size} the smallest is {_up(low)} and the largest {_down(high)}. "
            "Raise the budget, or offer smaller widths."
        )
    return capacity


def required_columns(recipe: Recipe, experts: int) -> tuple[int, ...]:
    """Columns of the widths that every layer must use; none where all experts are to be alike."""
    required = tuple(recipe.expert_bits.index(b) for b in sorted(set(recipe.at_least_one)))
    if recipe.cost == "uniform":
        return ()
    if len(required) > experts:
        raise InputError(
            f"at_least_one asks for {len(required)} widths in every layer, but a layer has "
            f"{experts} experts. Ask for fewer."
        )
    return required


def _up(number: float) -> str:
    """Rounded so that the number named is itself possible."""
    return str(number) if isinstance(number, int) else f"{math.ceil(number * 1e4) / 1e4:.4f}"


def _down(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{math.floor(number * 1e4) / 1e4:.4f}"
