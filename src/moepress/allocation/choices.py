"""What may be chosen for the experts, and what each choice takes of a budget.

The allocator picks one option for each item. An item is a projection, or a whole expert, and its
options are the offered widths. Where experts may be left out and projections may differ, an expert
is one item, and its options are "left out" and every pair of the other widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moepress.allocation.knapsack import Ints
from moepress.costs.scores import BOTH, ExpertScores
from moepress.format.codec import LEFT_OUT, codec_for
from moepress.recipe import Recipe

Item = Literal["projection", "expert", "pair"]


def offered(recipe: Recipe) -> tuple[int, ...]:
    """[B] widths that experts may take. A uniform plan leaves no expert out."""
    return recipe.widths if recipe.cost == "uniform" else recipe.expert_bits


def item_of(recipe: Recipe) -> Item:
    """What an item is. A random plan that may leave experts out draws widths of whole experts."""
    drops = LEFT_OUT in offered(recipe)
    if not recipe.per_projection or (drops and recipe.cost == "random"):
        return "expert"
    return "pair" if drops else "projection"


def pairs(widths: int) -> Ints:
    """[2, C] indices of widths: the first for both projections, then all pairs of the others."""
    others = np.indices((widths - 1, widths - 1)).reshape(2, -1) + 1
    return np.concatenate([np.zeros((2, 1), dtype=np.int64), others], axis=1)


def by_option(item: Item, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sizes of options [..., P, C] from the sizes of widths [..., 3, B].

    The axis of 3 is scores.ROUNDED: gate and up, down, both. A pair of widths takes the sum of both
    projections; leaving an expert out takes what the whole expert takes at width 0.
    """
    if item == "projection":
        return table[..., :BOTH, :]
    if item == "expert":
        return table[..., BOTH:, :]
    gate_up, down = pairs(table.shape[-1])
    summed = table[..., 0, gate_up] + table[..., 1, down]
    summed[..., 0] = table[..., BOTH, 0]
    return np.asarray(summed[..., None, :])


def cost_by_option(item: Item, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Costs of options [..., P, C] from the costs of widths [..., 3, B], which do not just add up.

    Rounding both projections costs less than the sum of rounding each, by a tenth at 1 bit. Beside
    the exact cost of leaving an expert out, that difference counts. So a pair of equal widths has
    the measured cost of both; a pair of different widths has the sum times the geometric mean of
    the ratios (measured cost of both) / (sum) at its two widths.
    """
    costs = by_option(item, table)
    if item != "pair":
        return costs
    summed = table[..., 0, :] + table[..., 1, :]
    together = np.divide(table[..., BOTH, :], summed, out=np.ones_like(summed), where=summed > 0)
    gate_up, down = pairs(table.shape[-1])[:, 1:]
    costs[..., 0, 1:] *= np.sqrt(together[..., gate_up] * together[..., down])
    return costs


def _nbytes(scores: ExpertScores, recipe: Recipe, bits: int, rows: int, cols: int) -> int:
    """Stored bytes of an expert's matrix [rows, cols]."""
    if bits == LEFT_OUT:
        return 0
    return codec_for(bits, cols, scores.group_size, recipe.expert_codec).nbytes(rows, cols)


@dataclass(frozen=True)
class Choices:
    """P items per expert, each with C options: the first is the smallest, the last the largest."""

    shape: tuple[int, int, int]  # L, E, P
    item: Item
    widths: tuple[int, ...]  # [B] offered, rising
    code_bits: Ints  # [P, C]
    nbytes: Ints  # [P, C] stored, side data and padding included
    total_weights: int  # of all routed experts

    @classmethod
    def of(cls, scores: ExpertScores, recipe: Recipe) -> Choices:
        matrices = (scores.gate_up_shape, scores.down_shape)
        widths, item = offered(recipe), item_of(recipe)
        code_bits = [[rows * cols * bits for bits in widths] for rows, cols in matrices]
        nbytes = [[_nbytes(scores, recipe, bits, *m) for bits in widths] for m in matrices]
        count, experts = scores.tokens.shape
        return cls(
            shape=(count, experts, 2 if item == "projection" else 1),
            item=item,
            widths=widths,
            code_bits=by_option(item, np.array([*code_bits, np.sum(code_bits, axis=0)])),
            nbytes=by_option(item, np.array([*nbytes, np.sum(nbytes, axis=0)])),
            total_weights=count * experts * sum(rows * cols for rows, cols in matrices),
        )

    def bits(self, chosen: Ints) -> Ints:
        """[L, E, 2] widths of gate and up and of down, for chosen options [L, E, P]."""
        both = np.broadcast_to(chosen, (*chosen.shape[:2], 2))
        return np.asarray(np.array(self.widths)[self._width_indices()[[0, 1], both]])

    def options(self, bits: npt.NDArray[np.int8]) -> Ints:
        """[L, E, P] the options that have these widths [L, E, 2]; the inverse of `bits`."""
        indices = np.searchsorted(self.widths, bits)
        if self.item != "pair":
            return indices[..., : self.shape[2]]
        same = (indices[..., None] == self._width_indices()).all(axis=-2)  # [L, E, C]
        return np.asarray(same.argmax(axis=-1)[..., None])

    def _width_indices(self) -> Ints:
        """[2, C] index of the width of gate and up, and of down, of each option."""
        count = len(self.widths)
        return pairs(count) if self.item == "pair" else np.array([range(count)] * 2)

    def extremes(self, sizes: Ints, required: Sequence[int]) -> tuple[int, int]:
        """Smallest and largest sum of `sizes` [P, C], with each option of `required` in use.

        Where experts may be left out, the smallest sum keeps one expert in every layer.
        """
        count, experts, _ = self.shape
        held = sizes[:, list(required)].sum()
        free = experts - len(required)
        low, high = (held + free * sizes[:, option].sum() for option in (0, -1))
        one = sizes[:, int(self.widths[0] == LEFT_OUT)].sum()
        return int(count * max(low, one)), int(count * high)
