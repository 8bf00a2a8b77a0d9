"""The items and options of the routed experts, and the size of each option.

The allocator picks one option for each item. An item is a projection or a whole expert, and its
options are the offered widths. But if experts may be left out and projections may have different
widths, the item is an expert, and its options are "left out" and all pairs of the other widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moepress.allocation.arrays import Floats, Ints
from moepress.costs.scores import BOTH, ExpertScores
from moepress.format.codec import LEFT_OUT, codec_for, padded_shapes
from moepress.recipe import Recipe

Item = Literal["projection", "expert", "pair"]


def offered(recipe: Recipe) -> tuple[float, ...]:
    """[B] widths that experts may take. A uniform plan leaves no expert out."""
    return recipe.widths if recipe.cost == "uniform" else recipe.expert_bits


def item_of(recipe: Recipe) -> Item:
    """What an item is: a projection, an expert of one width, or an expert of a pair of widths.

    A random plan that may leave experts out draws widths of whole experts.
    """
    may_leave_out = LEFT_OUT in offered(recipe)
    if not recipe.per_projection or (may_leave_out and recipe.cost == "random"):
        return "expert"
    return "pair" if may_leave_out else "projection"


def pairs(widths: int) -> Ints:
    """[2, C] indices of the widths of gate and up, and of down, for items that are pairs.

    The first option has the first width for both: left out. The others are all pairs of the rest.
    """
    others = np.indices((widths - 1, widths - 1)).reshape(2, -1) + 1
    return np.concatenate([np.zeros((2, 1), dtype=np.int64), others], axis=1)


def by_option(item: Item, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sizes of options [..., P, C] from the sizes of widths [..., 3, B].

    The axis of 3 is scores.ROUNDED: gate and up, down, both. The size of a pair of widths is the
    sum of the two projections. "Left out" has the size of the whole expert at width 0.
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
    """Costs of options [..., P, C] from the costs of widths [..., 3, B].

    As `by_option`, but costs do not simply add up: rounding both projections costs less than the
    sum of rounding each, a tenth less at 1 bit. Compared with the exact cost of leaving an expert
    out, that difference matters. So a pair of equal widths has the measured cost of both, and a
    pair of different widths has the sum times the geometric mean of the ratios
    (measured cost of both) / (sum) at its two widths.
    """
    costs = by_option(item, table)
    if item != "pair":
        return costs
    summed = table[..., 0, :] + table[..., 1, :]
    together = np.divide(table[..., BOTH, :], summed, out=np.ones_like(summed), where=summed > 0)
    gate_up, down = pairs(table.shape[-1])[:, 1:]
    costs[..., 0, 1:] *= np.sqrt(together[..., gate_up] * together[..., down])
    return costs


def _nbytes(scores: ExpertScores, recipe: Recipe, bits: float, rows: int, cols: int) -> int:
    """Stored bytes of an expert's matrix [rows, cols]."""
    if bits == LEFT_OUT:
        return 0
    return codec_for(bits, cols, scores.group_size, recipe.expert_codec).nbytes(rows, cols)


@dataclass(frozen=True)
class Choices:
    """P items per expert, each with C options: the first is the smallest, the last the largest.

    L MoE layers, E experts, B widths.
    """

    shape: tuple[int, int, int]  # L, E, P
    item: Item
    widths: tuple[float, ...]  # [B] offered, rising
    code_bits: Ints  # [P, C] code bits of all weights of an option together
    nbytes: Ints  # [P, C] stored bytes of an option, with side data and padding
    total_weights: int  # number of weights of all routed experts

    @classmethod
    def of(cls, scores: ExpertScores, recipe: Recipe) -> Choices:
        matrices = (scores.gate_up_shape, scores.down_shape)
        widths, item = offered(recipe), item_of(recipe)
        code_bits = [[round(rows * cols * bits) for bits in widths] for rows, cols in matrices]
        packed = padded_shapes(*matrices)
        nbytes = [[_nbytes(scores, recipe, bits, *m) for bits in widths] for m in packed]
        count, experts = scores.tokens.shape
        return cls(
            shape=(count, experts, 2 if item == "projection" else 1),
            item=item,
            widths=widths,
            code_bits=by_option(item, np.array([*code_bits, np.sum(code_bits, axis=0)])),
            nbytes=by_option(item, np.array([*nbytes, np.sum(nbytes, axis=0)])),
            total_weights=count * experts * sum(rows * cols for rows, cols in matrices),
        )

    def bits(self, chosen: Ints) -> Floats:
        """[L, E, 2] widths of gate and up and of down, for chosen options [L, E, P]."""
        both = np.broadcast_to(chosen, (*chosen.shape[:2], 2))
        return np.asarray(
            np.array(self.widths, dtype=np.float64)[self._width_indices()[[0, 1], both]]
        )

    def options(self, bits: Floats) -> Ints:
        """[L, E, P] options that have the widths `bits` [L, E, 2]: the inverse of `bits()`."""
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
        """Smallest and largest sum of `sizes` [P, C] over all items of the model.

        Every layer uses each option of `required` at least once. If experts may be left out, the
        smallest sum counts one expert of the smallest width in every layer: with scope "layer" each
        layer gets an equal share of the budget, which then has room for an expert. This only bounds
        the budget. A plan may leave out all experts of a layer; `allocate.keep_one` keeps one in
        the whole model.
        """
        count, experts, _ = self.shape
        held = sizes[:, list(required)].sum()
        free = experts - len(required)
        low, high = (held + free * sizes[:, option].sum() for option in (0, -1))
        one = sizes[:, int(self.widths[0] == LEFT_OUT)].sum()
        return int(count * max(low, one)), int(count * high)
