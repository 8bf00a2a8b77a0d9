"""The subject of a report: a plan, and everything else that a folder tells.

Everything that the report computes from scores and plans is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moepress.allocate import frontier
from moepress.allocation.arrays import at
from moepress.allocation.budget import Budget, budget_range
from moepress.allocation.choices import Choices, cost_by_option
from moepress.allocation.objective import text_weights, width_costs
from moepress.allocation.plan import BitAllocation
from moepress.costs.drop_costs import DropCosts
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.original.sizes import PartBytes
from moepress.prune import Pruning

STEPS = 16  # budgets at which the loss curve is computed
NUDGE = 0.1  # bits more and less whose effect is reported


@dataclass(frozen=True)
class Subject:
    """A plan, and what is available beside it; None: not available."""

    name: str
    plan: BitAllocation
    scores: ExpertScores | None = None
    parts: Mapping[str, PartBytes] | None = None
    evaluation: Mapping[str, Any] | None = None
    drop_costs: DropCosts | None = None
    pruning: Pruning | None = None  # in force whenever the folder is opened

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """Cost of each width of gate and up, down, and both, [L, E, 3, B]."""
        scores, recipe = self._scores(), self.plan.recipe
        choices = Choices.of(scores, recipe)
        budget = Budget.of(scores, recipe, choices)
        return width_costs(scores, recipe, text_weights(scores, recipe, choices, budget))

    @cached_property
    def paid(self) -> npt.NDArray[np.float64]:
        """Cost of each expert at the widths of the plan, [L, E]."""
        return self.cost_of(self.plan.bits)

    def cost_of(self, bits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Cost [L, E] of each expert at widths [L, E, 2] of gate and up, and down."""
        choices = Choices.of(self._scores(), self.plan.recipe)
        costs = cost_by_option(choices.item, self.costs)
        return np.asarray(at(costs, choices.options(bits)).sum(axis=-1))

    @cached_property
    def frontier(self) -> list[BitAllocation]:
        """The best plan at each of several budgets, by rising bits.

        This model's budget and budgets `NUDGE` above and below are among them. For a random or
        uniform plan, these are the plans that the scores would choose.
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
            raise InputError(
                "This needs scores, and there are none. Give the file of `moepress score`."
            )
        return self.scores
