"""What a report is about: a plan, and what is known beside it.

All that the report computes from scores and plans is computed here, from their public fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moepress.allocate import frontier
from moepress.allocation.budget import Budget, budget_range
from moepress.allocation.choices import Choices, cost_by_option
from moepress.allocation.knapsack import at
from moepress.allocation.objective import text_weights, width_costs
from moepress.allocation.plan import BitAllocation
from moepress.costs.drop_costs import DropCosts
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.original.sizes import PartBytes
from moepress.prune import Pruning

STEPS = 16  # budgets at which the loss curve is computed
NUDGE = 0.1  # bits more and less whose price is told


@dataclass(frozen=True)
class Subject:
    """What a report is about: a plan, and what is known beside it."""

    name: str
    plan: BitAllocation
    scores: ExpertScores | None = None
    parts: Mapping[str, PartBytes] | None = None
    evaluation: Mapping[str, Any] | None = None
    drop_costs: DropCosts | None = None
    pruning: Pruning | None = None  # what the folder skips whenever it is opened

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """What each width of each part of an expert adds to the predicted loss, [L, E, 3, B]."""
        scores, recipe = self._scores(), self.plan.recipe
        choices = Choices.of(scores, recipe)
        budget = Budget.of(scores, recipe, choices)
        return width_costs(scores, recipe, text_weights(scores, recipe, choices, budget))

    @cached_property
    def paid(self) -> npt.NDArray[np.float64]:
        """What each expert adds to the predicted loss at the widths it has, [L, E]."""
        return self.cost_of(self.plan.bits)

    def cost_of(self, bits: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
        """What each expert adds to the predicted loss at widths [L, E, 2] of gate and up, down."""
        choices = Choices.of(self._scores(), self.plan.recipe)
        costs = cost_by_option(choices.item, self.costs)
        return np.asarray(at(costs, choices.options(bits)).sum(axis=-1))

    @cached_property
    def frontier(self) -> list[BitAllocation]:
        """The best plan at each of a row of budgets, this model's and its neighbours' among them.

        A random or uniform plan is compared with what the scores would choose.
        """
        recipe, scores = self.plan.recipe, self._scores()
        if recipe.cost in ("random", "uniform"):
            recipe = recipe.with_changes(cost="error")
        low, high = budget_range(scores, recipe).bits
        near = (self.plan.average_bits + step for step in (-NUDGE, 0, NUDGE))
        budgets = {*np.linspace(low, high, STEPS).tolist(), *(b for b in near if low <= b <= high)}
        return frontier(scores, recipe, sorted(budgets))

    def _scores(self) -> ExpertScores:
        if self.scores is None:
            raise InputError("No scores are at hand. Give the file of `moepress score`.")
        return self.scores
