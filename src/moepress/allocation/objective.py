"""What a plan loses by what it chooses: the objective of the integer program.

Costs come from the scores, by source of calibration text; sources count alike, or so as to help the
worst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moepress.allocation.budget import expert_budget, linear_range
from moepress.allocation.choices import Menu, cost_by_item, item_of, offered
from moepress.allocation.knapsack import Floats
from moepress.allocation.prices import ByOrigin, weighed_sum, worst_case_weights
from moepress.errors import NumericalError
from moepress.format.codec import LEFT_OUT
from moepress.recipe import Recipe

if TYPE_CHECKING:
    from moepress.costs.scores import ExpertScores


def objective(scores: ExpertScores, recipe: Recipe, weights: Floats | None = None) -> Floats:
    """c [L, E, P, C]: what each column of each item adds to the predicted loss: `part_costs`."""
    return cost_by_item(item_of(recipe), part_costs(scores, recipe, weights))


def part_costs(scores: ExpertScores, recipe: Recipe, weights: Floats | None = None) -> Floats:
    """[L, E, 3, B] what each width of each part of an expert (scores.PARTS) adds to the loss.

    "error": `scores.cost`, the predicted KL in nats per token; where scores were made without
    gradients, the squared error in the MoE block's output over the energy of the residual stream
    that the output is added to. That weighs layers against each other.

    "paper": phi^alpha w^beta epsilon^gamma, eq. 3-4 of arXiv:2410.06270.

    Args:
        weights: [D] of the sources of text; None: all alike.
    """
    if recipe.cost != "paper":
        errors = source_costs(scores, recipe)
        return np.asarray(
            errors.sum(axis=0) if weights is None else np.tensordot(weights, errors, axes=1)
        )
    squared = scores.squared_error[..., offered_columns(scores, recipe)]
    phi = scores.tokens / scores.total_tokens  # [L, E]
    w = scores.routing_weight / scores.total_tokens  # [L, E]
    with np.errstate(all="ignore"):  # looked at below
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
    return unknown_is_not_harmless(np.asarray(costs), scores, recipe)


def source_costs(scores: ExpertScores, recipe: Recipe) -> Floats:
    """[D, L, E, 3, B] the loss on each source of text."""
    costs = scores.cost[..., offered_columns(scores, recipe)]
    return unknown_is_not_harmless(costs, scores, recipe)


def unknown_is_not_harmless(costs: Floats, scores: ExpertScores, recipe: Recipe) -> Floats:
    """Costs [..., L, E, 3, B] under which an expert that no token chose is not the first to go.

    It measures zero at every width. Leaving it out is taken to cost what it costs of the expert of
    its layer that is cheapest to lose.
    """
    unseen = scores.tokens == 0
    if offered(recipe)[0] != LEFT_OUT or not unseen.any():
        return costs
    costs = costs.copy()
    seen = np.where(unseen[:, :, None], np.inf, costs[..., 0])  # [..., L, E, 3]
    cheapest = seen.min(axis=-2, keepdims=True)
    cheapest = np.where(np.isfinite(cheapest), cheapest, 0.0)  # a layer that no token reached
    costs[..., 0] = np.where(unseen[:, :, None], cheapest, costs[..., 0])
    return costs


def offered_columns(scores: ExpertScores, recipe: Recipe) -> list[int]:
    """[B] where the recipe's widths are among those of the scores."""
    return [scores.bits.index(b) for b in offered(recipe)]


def source_weights(scores: ExpertScores, recipe: Recipe) -> Floats:
    """[D] what the loss on each source of text counts: alike, or so as to help the worst."""
    if recipe.over == "mean" or recipe.cost != "error":
        return np.ones(len(scores.cost))
    menu = Menu.of(scores, recipe)
    shares = np.array(scores.source_tokens) / scores.total_tokens  # cost -> per token of the source
    costs = cost_by_item(menu.item, source_costs(scores, recipe))
    costs = costs / shares[:, None, None, None, None]
    bits = recipe.bits is not None
    sizes = np.broadcast_to(menu.code_bits if bits else menu.nbytes, costs.shape[1:])
    groups = [ByOrigin(flat(costs, 1), flat(sizes))]
    capacity = expert_budget(scores, recipe, menu)
    if not bits:  # the linears compete for the same bytes
        groups.append(ByOrigin(scores.linear_cost / shares[:, None, None], scores.linear_bytes))
        capacity += linear_range(scores, recipe)[0]
    return worst_case_weights(groups, capacity) / shares


def linear_costs(scores: ExpertScores, weights: Floats) -> Floats:
    """[M, W] predicted loss of each open linear at each width."""
    return weighed_sum(weights, scores.linear_cost)


def flat(table: npt.NDArray[Any], leading: int = 0) -> npt.NDArray[Any]:
    """[..., L, E, P, C] as [..., I, C], `leading` axes kept."""
    return table.reshape(*table.shape[:leading], -1, table.shape[-1])
