"""The objective of the integer program: the cost of each option.

The costs come from the scores, which keep them text by text. They are summed over the texts of the
calibration set, or weighted such that the loss on the worst text is least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moepress.allocation.arrays import Floats
from moepress.allocation.budget import Budget
from moepress.allocation.choices import Choices, cost_by_option, item_of, offered
from moepress.allocation.prices import ItemsByText, weighted_sum, worst_case_weights
from moepress.costs.scores import ExpertScores
from moepress.errors import NumericalError
from moepress.format.codec import LEFT_OUT
from moepress.recipe import Recipe


def objective(scores: ExpertScores, recipe: Recipe, weights: Floats | None = None) -> Floats:
    """Costs c [L, E, P, C]: what each option of each item adds to the predicted loss.

    Args:
        weights: [D] of the texts; None: all 1.
    """
    return cost_by_option(item_of(recipe), width_costs(scores, recipe, weights))


def width_costs(scores: ExpertScores, recipe: Recipe, weights: Floats | None = None) -> Floats:
    """Costs [L, E, 3, B]: what each width of each of scores.ROUNDED adds to the predicted loss.

    If `recipe.cost` is "paper": phi^alpha w^beta epsilon^gamma, eq. 3-4 of arXiv:2410.06270.
    Otherwise `scores.cost`, the predicted KL in nats per token; for scores made without gradients
    it is the squared error of the MoE block's output over the energy of the residual stream that
    the output is added to, which makes layers comparable.

    Args:
        weights: [D] of the texts; None: all 1. "paper" does not use them.
    """
    if recipe.cost != "paper":
        errors = text_costs(scores, recipe)
        return np.asarray(
            errors.sum(axis=0) if weights is None else np.tensordot(weights, errors, axes=1)
        )
    squared = scores.squared_error[..., offered_indices(scores, recipe)]
    phi, w = scores.frequency, scores.mean_weight  # [L, E]
    with np.errstate(all="ignore"):  # checked below
        significance = phi**recipe.alpha * w**recipe.beta
        costs = significance[:, :, None, None] * np.sqrt(squared) ** recipe.gamma
    wrong = np.argwhere(~np.isfinite(costs))
    if len(wrong):
        row, expert = wrong[0, :2].tolist()
        raise NumericalError(
            f"phi^{recipe.alpha} w^{recipe.beta} epsilon^{recipe.gamma} of layer "
            f"{scores.layers[row]} expert {expert} is not finite (phi {phi[row, expert]:.3g}, w "
            f"{w[row, expert]:.3g}). Use exponents of at least 0, and smaller ones."
        )
    return with_unseen_experts(np.asarray(costs), scores, recipe)


def text_costs(scores: ExpertScores, recipe: Recipe) -> Floats:
    """Costs [D, L, E, 3, B] on each text."""
    costs = scores.cost[..., offered_indices(scores, recipe)]
    return with_unseen_experts(costs, scores, recipe)


def with_unseen_experts(costs: Floats, scores: ExpertScores, recipe: Recipe) -> Floats:
    """Costs [..., L, E, 3, B] with a cost for leaving out an expert that no token chose.

    Such an expert has a measured error of 0 at every width, but its cost is unknown, not 0. So that
    it is not the first to be left out, leaving it out gets the cost of leaving out the cheapest
    other expert of its layer, over all texts: on a single one other experts may cost nothing.
    """
    unseen = scores.tokens == 0
    if offered(recipe)[0] != LEFT_OUT or not unseen.any():
        return costs
    costs = costs.copy()
    gone = costs[..., 0]  # [..., L, E, 3]
    total = gone.reshape(-1, *gone.shape[-3:]).sum(axis=0)  # [L, E, 3]
    # If no token reached the layer, this is an unseen expert, of cost 0.
    cheapest = np.where(unseen[:, :, None], np.inf, total).argmin(axis=1)[:, None]  # [L, 1, 3]
    like = np.take_along_axis(gone, np.broadcast_to(cheapest, (*gone.shape[:-2], 1, 3)), axis=-2)
    costs[..., 0] = np.where(unseen[:, :, None], like, gone)
    return costs


def offered_indices(scores: ExpertScores, recipe: Recipe) -> list[int]:
    """[B] index of each of the recipe's widths among those of the scores."""
    return [scores.bits.index(b) for b in offered(recipe)]


def text_weights(scores: ExpertScores, recipe: Recipe, choices: Choices, budget: Budget) -> Floats:
    """[D] weight of the loss on each text: 1, or such that the worst text's loss is least."""
    if recipe.over == "mean" or recipe.cost != "error":
        return np.ones(len(scores.cost))
    shares = np.array(scores.text_tokens) / scores.all_tokens  # cost / share: per token of a text
    costs = cost_by_option(choices.item, text_costs(scores, recipe))
    costs = costs / shares[:, None, None, None, None]
    sizes = np.broadcast_to(budget.sizes, costs.shape[1:])
    groups = [ItemsByText(flat(costs, 1), flat(sizes))]
    capacity = budget.capacity
    if budget.in_bytes and len(scores.linears):
        linear_cost = scores.linear_cost / shares[:, None, None]
        groups.append(ItemsByText(linear_cost, scores.linear_bytes))
        capacity = budget.shared_capacity
    return worst_case_weights(groups, capacity) / shares


def linear_costs(scores: ExpertScores, weights: Floats) -> Floats:
    """Costs [M, W] of each open tensor at each width.

    Args:
        weights: [D] of the texts.
    """
    return weighted_sum(weights, scores.linear_cost)


def flat(table: npt.NDArray[Any], leading: int = 0) -> npt.NDArray[Any]:
    """A table [..., L, E, P, C] reshaped to [..., I, C], I = L E P, after `leading` other axes."""
    return table.reshape(*table.shape[:leading], -1, table.shape[-1])
