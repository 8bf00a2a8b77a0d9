"""What may be chosen for the experts, and what each choice takes of a budget.

Items take columns. The columns of a projection, or of an expert as one item, are the offered
widths. Where experts may be left out and projections may differ, an expert is one item, and its
columns are "left out" and every pair of the other widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from moepress.allocation.knapsack import Ints
from moepress.allocation.tensors import codec_for
from moepress.format.codec import LEFT_OUT
from moepress.recipe import Recipe

if TYPE_CHECKING:
    from moepress.costs.scores import ExpertScores

Item = Literal["projection", "expert", "pair"]
BOTH = 2  # index in scores.PARTS of an expert quantized whole


def offered(recipe: Recipe) -> tuple[int, ...]:
    """[B] widths that experts may take. A uniform plan leaves none of them out."""
    return recipe.widths if recipe.cost == "uniform" else recipe.expert_bits


def item_of(recipe: Recipe) -> Item:
    """What takes a column of its own. A random plan that may leave experts out draws whole ones."""
    drops = LEFT_OUT in offered(recipe)
    if not recipe.per_projection or (drops and recipe.cost == "random"):
        return "expert"
    return "pair" if drops else "projection"


def pairs(widths: int) -> Ints:
    """[2, C] the first width for both projections, then every pair of the others."""
    others = np.indices((widths - 1, widths - 1)).reshape(2, -1) + 1
    return np.concatenate([np.zeros((2, 1), dtype=np.int64), others], axis=1)


def by_item(item: Item, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[..., P, C] what columns take, from what widths take of parts of an expert, [..., 3, B].

    Parts as in scores.PARTS: gate and up alone, down alone, both. A pair of widths takes what both
    projections do; what being left out takes is that of the whole.
    """
    if item == "projection":
        return table[..., :BOTH, :]
    if item == "expert":
        return table[..., BOTH:, :]
    gate_up, down = pairs(table.shape[-1])
    summed = table[..., 0, gate_up] + table[..., 1, down]
    summed[..., 0] = table[..., BOTH, 0]
    return np.asarray(summed[..., None, :])


def cost_by_item(item: Item, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same for costs, whose parts do not just add up.

    Errors of both projections together are less than their sum, by a tenth at 1 bit. Beside an
    expert that is left out, whose cost is exact, that counts: pairs of a width have the cost that
    was measured of both, others the sum times the mean (geometric) of what it is of the sum there.
    """
    costs = by_item(item, table)
    if item != "pair":
        return costs
    summed = table[..., 0, :] + table[..., 1, :]
    together = np.divide(table[..., BOTH, :], summed, out=np.ones_like(summed), where=summed > 0)
    gate_up, down = pairs(table.shape[-1])[:, 1:]
    costs[..., 0, 1:] *= np.sqrt(together[..., gate_up] * together[..., down])
    return costs


def _stored(scores: ExpertScores, recipe: Recipe, bits: int, rows: int, cols: int) -> int:
    """Bytes of an expert's matrix."""
    if bits == LEFT_OUT:
        return 0
    return codec_for(bits, cols, scores.group_size, recipe.expert_codec).nbytes(rows, cols)


@dataclass(frozen=True)
class Menu:
    """P items per expert, each of C columns: the first is the smallest, the last the largest."""

    shape: tuple[int, int, int]  # L, E, P
    item: Item
    widths: tuple[int, ...]  # [B] offered, rising
    code_bits: Ints  # [P, C]
    nbytes: Ints  # [P, C] stored, side data and padding included
    total_weights: int  # of all routed experts

    @classmethod
    def of(cls, scores: ExpertScores, recipe: Recipe) -> Menu:
        matrices = (scores.gate_up_shape, scores.down_shape)
        widths, item = offered(recipe), item_of(recipe)
        code_bits = [[rows * cols * bits for bits in widths] for rows, cols in matrices]
        nbytes = [[_stored(scores, recipe, bits, *m) for bits in widths] for m in matrices]
        count, experts = scores.tokens.shape
        return cls(
            shape=(count, experts, 2 if item == "projection" else 1),
            item=item,
            widths=widths,
            code_bits=by_item(item, np.array([*code_bits, np.sum(code_bits, axis=0)])),
            nbytes=by_item(item, np.array([*nbytes, np.sum(nbytes, axis=0)])),
            total_weights=count * experts * sum(rows * cols for rows, cols in matrices),
        )

    def bits(self, choice: Ints) -> Ints:
        """[L, E, 2] widths of gate and up and of down, for chosen columns [L, E, P]."""
        both = np.broadcast_to(choice, (*choice.shape[:2], 2))
        return np.asarray(np.array(self.widths)[self._parts()[[0, 1], both]])

    def columns(self, bits: npt.NDArray[np.int8]) -> Ints:
        """[L, E, P] the columns that have these bits [L, E, 2]; undoes `bits`."""
        parts = np.searchsorted(self.widths, bits)
        if self.item != "pair":
            return parts[..., : self.shape[2]]
        same = (parts[..., None] == self._parts()).all(axis=-2)  # [L, E, C]
        return np.asarray(same.argmax(axis=-1)[..., None])

    def _parts(self) -> Ints:
        """[2, C] columns of gate and up, and of down, in a table of widths."""
        count = len(self.widths)
        return pairs(count) if self.item == "pair" else np.array([range(count)] * 2)

    def extremes(self, sizes: Ints, required: Sequence[int]) -> tuple[int, int]:
        """Smallest and largest sum of `sizes` [P, C], with each column of `required` in use.

        Where experts may be left out, the smallest keeps one in every layer.
        """
        count, experts, _ = self.shape
        held = sizes[:, list(required)].sum()
        free = experts - len(required)
        low, high = (held + free * sizes[:, column].sum() for column in (0, -1))
        one = sizes[:, int(self.widths[0] == LEFT_OUT)].sum()
        return int(count * max(low, one)), int(count * high)
