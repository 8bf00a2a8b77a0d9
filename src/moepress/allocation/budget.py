"""The budget of a plan: its range for a model, and what it leaves for the routed experts.

A budget has one of three units: average code bits of the routed experts (the paper's k), stored
bits per weight of the whole model, or bytes of the folder. The first counts only the experts. Under
the other two all tensors whose width is open compete for the same bytes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moepress.allocation.arrays import TOLERANCE, Ints, at
from moepress.allocation.choices import Choices, offered
from moepress.costs.scores import ExpertScores
from moepress.errors import BudgetError, InputError
from moepress.recipe import Recipe, fallback_width

logger = logging.getLogger(__name__)


class BudgetRange(NamedTuple):
    """Smallest possible budget, and the largest that a plan can use up, in each unit."""

    bits: tuple[float, float]  # average code bits of the routed experts
    bpw: tuple[float, float]  # stored bits per weight of the whole model
    size: tuple[int, int]  # bytes of the folder


@dataclass(frozen=True)
class Budget:
    """The budget of a recipe for one model. P items per expert, C options each."""

    unit: str  # "bits", "bpw" or "size"
    asked: float  # the recipe's value, in `unit`
    largest: float  # value that a plan can use up, in `unit`
    capacity: int  # left for the experts if open tensors are as small as possible; as `sizes`
    sizes: Ints  # [P, C] of each option: code bits under "bits", else stored bytes
    required: tuple[int, ...]  # options that every layer uses at least once
    open_bytes: tuple[int, int]  # smallest and largest stored bytes of all open tensors together

    @classmethod
    def of(cls, scores: ExpertScores, recipe: Recipe, choices: Choices) -> Budget:
        """The budget of `recipe`. Above the largest possible value it is lowered to that value.

        Raises:
            InputError: the recipe sets no budget.
            BudgetError: the budget is below the smallest possible value.
        """
        possible = budget_range(scores, recipe)._asdict()
        unit = next((unit for unit in possible if getattr(recipe, unit) is not None), None)
        if unit is None:
            raise InputError("No budget. Set one of bits (say 2.5), bpw, or size.")
        asked, (smallest, largest) = getattr(recipe, unit), possible[unit]
        used = min(asked, largest)
        open_bytes = open_range(scores, recipe)
        if unit == "bits":
            capacity = math.floor(used * choices.total_weights * (1 + TOLERANCE))
        elif unit == "bpw":
            weights = scores.other_weights + choices.total_weights
            total = math.floor(used * weights / 8 * (1 + TOLERANCE))
            capacity = total - scores.fixed_bytes - open_bytes[0]
        else:
            rest = scores.fixed_bytes + scores.file_bytes + open_bytes[0]
            capacity = math.floor(used) - rest
        sizes = choices.code_bits if unit == "bits" else choices.nbytes
        required = required_options(recipe, choices.shape[1])
        if capacity < choices.extremes(sizes, required)[0]:
            least = [choices.widths[option] for option in required]
            raise BudgetError(
                f"{unit} {asked} is impossible: with expert_bits {list(offered(recipe))}"
                f"{f', at least one of {least} in each layer' if least else ''} and group "
                f"size {scores.group_size} the smallest is {_up(smallest)} and the largest "
                f"{_down(largest)}. Raise the budget, or offer smaller widths."
            )
        return cls(unit, asked, largest, capacity, sizes, required, open_bytes)

    @property
    def in_bytes(self) -> bool:
        """Whether experts and open tensors compete for the same bytes."""
        return self.unit != "bits"

    @property
    def shared_capacity(self) -> int:
        """Bytes for the experts and the open tensors together, where they compete."""
        return self.capacity + self.open_bytes[0]

    def warn_of_excess(self) -> None:
        """Log a warning if the budget is above the largest possible, which is then used."""
        if self.asked > self.largest:
            logger.warning(
                "%s %s is above the largest possible, %s, with the widths that are offered: the "
                "result has that. Offer larger widths (--expert-bits) to use more.",
                self.unit,
                int(self.asked) if self.unit == "size" else f"{self.asked:g}",
                _down(self.largest),
            )  # fmt: skip


def budget_range(scores: ExpertScores, recipe: Recipe) -> BudgetRange:
    """The smallest and the largest plan that the recipe allows, in each unit of a budget."""
    choices = Choices.of(scores, recipe)
    required = required_options(recipe, choices.shape[1])
    low_bits, high_bits = choices.extremes(choices.code_bits, required)
    low, high = (
        scores.fixed_bytes + linears + experts
        for linears, experts in zip(
            open_range(scores, recipe), choices.extremes(choices.nbytes, required), strict=True
        )
    )
    weights = scores.other_weights + choices.total_weights
    return BudgetRange(
        bits=(low_bits / choices.total_weights, high_bits / choices.total_weights),
        bpw=(low * 8 / weights, high * 8 / weights),
        size=(scores.file_bytes + low, scores.file_bytes + high),
    )


def open_range(scores: ExpertScores, recipe: Recipe) -> tuple[int, int]:
    """Smallest and largest stored bytes of all open tensors together."""
    if recipe.cost != "error":
        fallback = int(at(scores.linear_bytes, fallback_options(scores)).sum())
        return fallback, fallback
    low = np.where(scores.linear_offered, scores.linear_bytes, 2**62).min(axis=1, initial=2**62)
    high = np.where(scores.linear_offered, scores.linear_bytes, 0).max(axis=1, initial=0)
    return int(low.sum()), int(high.sum())


def fallback_options(scores: ExpertScores) -> Ints:
    """[M] index of the fallback width of each open tensor."""
    bits = scores.linear_bits
    widths = [
        fallback_width([b for b, is_offered in zip(bits, row, strict=True) if is_offered])
        for row in scores.linear_offered.tolist()
    ]
    return np.array([bits.index(width) for width in widths], dtype=np.int64)


def required_options(recipe: Recipe, experts: int) -> tuple[int, ...]:
    """Options that every layer must use (`at_least_one`); none for a uniform plan.

    Args:
        experts: number of experts of a layer.

    Raises:
        InputError: a layer has fewer experts than required options.
    """
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
    """The number as text, rounded up to four decimals: a budget of that value is possible."""
    return str(number) if isinstance(number, int) else f"{math.ceil(number * 1e4) / 1e4:.4f}"


def _down(number: float) -> str:
    """The number as text, rounded down to four decimals."""
    return str(number) if isinstance(number, int) else f"{math.floor(number * 1e4) / 1e4:.4f}"
