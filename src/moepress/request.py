"""A request to compress: model, recipe and the sizes that follow, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.allocation.budget import Budget
from moepress.allocation.choices import Choices
from moepress.allocation.tensors import ModelTensors
from moepress.checks import checked
from moepress.costs.scores import ExpertScores
from moepress.original.source import Source
from moepress.recipe import Recipe
from moepress.score import unmeasured


@dataclass(frozen=True)
class Request:
    """What to compress, and how."""

    source: Source
    recipe: Recipe
    tensors: ModelTensors
    sizes: ExpertScores  # the model's sizes, all measurements 0

    @classmethod
    def of(
        cls,
        model: str | Path,
        recipe: Recipe | str | Path,
        device: str,
        trust_remote_code: bool = False,
        *,
        needs_budget: bool = False,
        **changes: Any,
    ) -> Request:
        """The request for a model and a recipe, some fields of it changed.

        Raises:
            InputError: model or recipe cannot be used, or there is no budget and one is needed.
            BudgetError: no allocation meets the budget.
        """
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        recipe = recipe.with_changes(**changes)
        source = Source(model, device, trust_remote_code)
        recipe = checked(source, recipe)
        tensors = ModelTensors.of(source, recipe)
        sizes = unmeasured(source, recipe, tensors)
        if recipe.has_budget or needs_budget:
            # Raise BudgetError for an impossible budget now, not after hours of scoring.
            Budget.of(sizes, recipe, Choices.of(sizes, recipe)).warn_of_excess()
        return cls(source, recipe, tensors, sizes)
