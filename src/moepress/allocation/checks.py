"""Checks that a plan for a recipe can be made from given scores."""

from __future__ import annotations

import numpy as np

from moepress.allocation.choices import offered
from moepress.costs.scores import ExpertScores
from moepress.errors import BudgetError, InputError, NumericalError
from moepress.recipe import Recipe

# Fields in which a recipe must agree with the recipe that the scores were measured with: they
# decide which tensors are open, and how tensors are stored.
OPEN_FIELDS = (
    "expert_codec", "linear_codec", "linear_bits", "attention_bits", "shared_expert_bits",
    "dense_mlp_bits", "head_bits", "embedding_bits", "sensitivity",
)  # fmt: skip


def check_inputs(scores: ExpertScores, recipe: Recipe) -> None:
    """Check that scores and recipe fit together.

    Raises:
        InputError: the recipe asks for something that was not measured.
        BudgetError: no uniform plan has the recipe's bits.
        NumericalError: a score is negative, NaN or infinite.
    """
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


def check_linears(scores: ExpertScores) -> None:
    """Raise NumericalError if an open tensor has no finite cost, or a negative or NaN one."""
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
