"""Which expert gets how many bits: the integer program of arXiv:2410.06270, section 3.2.

Every routed expert (or each of its two projections) is an item that takes exactly one of the
offered widths. With c[i, b] what width b of item i costs in quality and s[i, b] what it takes of
the budget C:

    minimise    sum_i c[i, b_i]     subject to    sum_i s[i, b_i] <= C                (eq. 5)

a multiple-choice knapsack. The paper asks for equality; here it is "at most", because with true
byte sizes hardly any budget can be met to the byte, and because a width that costs more bytes and
more error (rounding is not monotone) is never worth taking just to use up the budget. What is left
over goes to widths that cost nothing: an expert that no calibration token reached measures zero
error at every width, which means unknown, not harmless.

What fits into a budget: budget.py. How the program is solved: knapsack.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moepress.budget import (
    Menu,
    expert_budget,
    linear_range,
    required_columns,
    usual_columns,
)
from moepress.checkpoint import load_json, save_json
from moepress.codec import GROUP_SIZES
from moepress.draw import draw
from moepress.duals import ByOrigin, Items, price_at, weighed_sum, worst_case_weights
from moepress.errors import BudgetError, CheckpointError, InputError, NumericalError
from moepress.knapsack import Floats, Ints, at, solve
from moepress.recipe import END_BITS, FAST, Recipe

if TYPE_CHECKING:
    from moepress.score import ExpertScores

PROJECTIONS = ("gate_up", "down")
BOTH = 2  # index in score.PARTS of an expert quantized whole
KIND = "plan"
# What a recipe must have in common with that of the scores: it says what is open, and how stored.
OPEN_FIELDS = (
    "expert_codec", "linear_codec", "linear_bits", "attention_bits", "shared_expert_bits",
    "dense_mlp_bits", "head_bits", "embedding_bits", "sensitivity",
)  # fmt: skip


@dataclass(frozen=True)
class BitAllocation:
    """The plan: code bits of both projections of every routed expert. L MoE layers, E experts."""

    layers: tuple[int, ...]  # [L] index of each MoE layer in the model
    bits: npt.NDArray[np.int8]  # [L, E, 2] gate_up, down
    linear_bits: dict[str, int]  # of each linear that the recipe leaves open, by parameter name
    group_size: int
    predicted_loss: float  # what the objective sums to
    expert_bytes: int  # stored bytes of all routed experts
    total_bytes: int  # of all tensors
    folder_bytes: int  # of all files
    average_bits: float  # code bits per routed-expert weight, the paper's k
    expert_bits_per_weight: float  # stored bits per routed-expert weight, side data included
    bits_per_weight: float  # stored bits per weight of the whole model
    recipe: Recipe
    provenance: dict[str, str]

    def __post_init__(self) -> None:
        bits = np.array(self.bits, dtype=np.int8)  # a copy that nobody else can write to
        bits.setflags(write=False)
        object.__setattr__(self, "bits", bits)
        if wrong := self._contradiction():
            raise CheckpointError(
                f"The plan does not fit together: {wrong}. Make it again with `moepress allocate`."
            )

    def _contradiction(self) -> str | None:
        """What is wrong with the plan, and what was expected; None if nothing is."""
        shape, count = self.bits.shape, len(self.layers)
        if len(shape) != 3 or shape[0] != count or shape[2] != len(PROJECTIONS) or not shape[1]:
            return f"widths of shape {shape}, expected [L, E, 2] with L = {count} layers"
        if list(self.layers) != sorted(set(self.layers)) or not count:
            return f"layers {self.layers}, expected distinct ones in rising order"
        if not set(np.unique(self.bits)) <= set(self.recipe.expert_bits):
            return f"widths {np.unique(self.bits)}, expected some of {self.recipe.expert_bits}"
        widths = {*self.recipe.linear_bits, *END_BITS}
        if not set(self.linear_bits.values()) <= widths:
            return f"linears of {set(self.linear_bits.values())}, expected some of {widths}"
        if self.group_size not in GROUP_SIZES:
            return f"group size {self.group_size}, expected one of {GROUP_SIZES}"
        sizes = (self.expert_bytes, self.total_bytes, self.folder_bytes)
        if not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            return f"experts, tensors and files of {sizes} bytes, expected rising numbers"
        rates = (self.average_bits, self.expert_bits_per_weight, self.bits_per_weight)
        if not all(0 < rate < math.inf for rate in rates) or rates[0] > rates[1]:
            return f"code bits, stored expert bits and stored bits per weight of {rates}"
        if not 0 <= self.predicted_loss < math.inf:
            return f"a predicted loss of {self.predicted_loss}, expected a finite number from 0 up"
        if not isinstance(self.provenance, dict):
            return f"provenance {self.provenance!r}, expected names and values"
        return None

    def digest(self) -> str:
        """A short hash of all widths."""
        linears = json.dumps(self.linear_bits, sort_keys=True) if self.linear_bits else ""
        return hashlib.sha256(self.bits.tobytes() + linears.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write JSON, atomically; equal plans give equal bytes. One digit per expert.

        Raises:
            CheckpointError: the file cannot be written.
        """
        rows = [
            {"layer": layer, **{n: _digits(row[:, p]) for p, n in enumerate(PROJECTIONS)}}
            for layer, row in zip(self.layers, self.bits, strict=True)
        ]
        fields = {k: v for k, v in vars(self).items() if k not in ("layers", "bits")}
        save_json(path, {"kind": KIND, **fields, "recipe": self.recipe.to_dict(), "layers": rows})

    @classmethod
    def load(cls, path: Path) -> BitAllocation:
        """Read what `save` wrote.

        Raises:
            InputError: the file is JSON, but no plan.
            CheckpointError: missing, damaged, or a plan that contradicts itself.
        """
        fields = load_json(path)
        if not isinstance(fields, dict) or fields.pop("kind", None) != KIND:
            raise InputError(
                f"{path} is not a plan. Expected a file made by `moepress allocate`, or "
                "moepress_plan.json in a compressed folder."
            )
        try:
            rows = fields.pop("layers")
            bits = [[[int(digit) for digit in row[n]] for n in PROJECTIONS] for row in rows]
            if "linear_bits" not in fields:  # written when all else was scalar, at fixed widths
                fields["linear_bits"] = {}
                fields["recipe"] = FAST.to_dict() | fields["recipe"]
            return cls(
                **fields | {"recipe": Recipe.from_dict(fields["recipe"])},
                layers=tuple(int(row["layer"]) for row in rows),
                bits=np.array(bits, dtype=np.int8).swapaxes(1, 2),
            )
        except (TypeError, KeyError, ValueError, OverflowError, CheckpointError) as error:
            raise CheckpointError(
                f"{path} is a damaged plan ({type(error).__name__}: {error}). Make it again with "
                "`moepress allocate`."
            ) from error


def allocate(
    scores: ExpertScores, recipe: Recipe | None = None, **changes: object
) -> BitAllocation:
    """Choose the code bits of every routed expert: least predicted loss within the budget.

    A budget above the largest possible is lowered to it, with a warning in the log.

    Args:
        scores: what each width would cost, as `moepress score` measured it.
        recipe: budget, objective (`cost`, `scope`, `per_projection`, exponents) and widths, which
            must be among the measured ones. None: the recipe the scores were measured with.
        changes: fields of the recipe to set, such as bits=2.5.

    Returns:
        The plan. `predicted_loss` is in units of the objective; under "random" and "uniform" it
        is what "error" would count, over the "worst" source the weighed sum that is minimised. It
        cannot be compared between `per_projection` on and off: the errors of two projections add
        up to nearly, not exactly, the error of both.

    Raises:
        InputError: no budget, or scores and recipe do not fit together.
        BudgetError: the budget is too small; names the smallest and the largest possible.
        NumericalError: NaN, infinity or a negative number in the scores.
        MoepressError: HiGHS did not solve the program.
    """
    recipe = (recipe or Recipe.from_dict(scores.recipe)).with_changes(**changes)
    check_inputs(scores, recipe)
    menu = Menu.of(scores, recipe)
    weights = source_weights(scores, recipe)
    costs = objective(scores, recipe, weights)
    sizes = menu.code_bits if recipe.bits is not None else menu.nbytes
    capacity = expert_budget(scores, recipe, menu)  # with the linears as small as possible
    linears = choose_linears(scores, recipe, menu, costs, weights, capacity)
    linear_bytes = int(at(scores.linear_bytes, linears).sum())
    if recipe.bits is None:
        capacity -= linear_bytes - linear_range(scores, recipe)[0]
    choice = (
        uniform(recipe, menu, sizes, capacity)
        if recipe.cost == "uniform"
        else choose(recipe, costs, sizes, capacity)
    )
    loss = float(at(costs, choice).sum())
    if recipe.cost != "paper":  # in other units
        loss += float(at(linear_costs(scores, weights), linears).sum())
    expert_bytes = int(at(menu.nbytes, choice).sum())
    total_bytes = scores.fixed_bytes + linear_bytes + expert_bytes
    return BitAllocation(
        layers=scores.layers,
        bits=np.broadcast_to(
            np.array(menu.widths, dtype=np.int8)[choice], (*menu.shape[:2], len(PROJECTIONS))
        ),
        linear_bits={
            name: scores.linear_bits[column]
            for name, column in zip(scores.linears, linears.tolist(), strict=True)
        },
        group_size=scores.group_size,
        predicted_loss=loss,
        expert_bytes=expert_bytes,
        total_bytes=total_bytes,
        folder_bytes=total_bytes + scores.file_bytes,
        average_bits=int(at(menu.code_bits, choice).sum()) / menu.total_weights,
        expert_bits_per_weight=expert_bytes * 8 / menu.total_weights,
        bits_per_weight=total_bytes * 8 / (scores.fixed_weights + menu.total_weights),
        recipe=recipe,
        provenance=dict(scores.provenance),
    )


def source_weights(scores: ExpertScores, recipe: Recipe) -> Floats:
    """[D] what the loss on each source of text counts: alike, or so as to help the worst."""
    if recipe.over == "mean" or recipe.cost != "error":
        return np.ones(len(scores.cost))
    menu = Menu.of(scores, recipe)
    shares = np.array(scores.source_tokens) / scores.total_tokens  # cost -> per token of the source
    costs = expert_errors(scores, recipe) / shares[:, None, None, None, None]
    bits = recipe.bits is not None
    sizes = np.broadcast_to(menu.code_bits if bits else menu.nbytes, costs.shape[1:])
    groups = [ByOrigin(_flat(costs, 1), _flat(sizes))]
    capacity = expert_budget(scores, recipe, menu)
    if not bits:  # the linears compete for the same bytes
        groups.append(ByOrigin(scores.linear_cost / shares[:, None, None], scores.linear_bytes))
        capacity += linear_range(scores, recipe)[0]
    return worst_case_weights(groups, capacity) / shares


def choose_linears(
    scores: ExpertScores, recipe: Recipe, menu: Menu, costs: Floats, weights: Floats, capacity: int
) -> Ints:
    """[M] column of each open linear's width: by what a byte is worth, or the usual width.

    Args:
        costs: [L, E, P, B] of the experts.
        weights: [D] of the sources of text.
        capacity: of the experts, with the linears as small as possible.
    """
    if recipe.cost != "error" or not len(scores.linears):
        return usual_columns(scores)
    linears = Items(linear_costs(scores, weights), scores.linear_bytes)
    if recipe.bits is not None:
        experts = Items(_flat(costs), _flat(np.broadcast_to(menu.code_bits, costs.shape)))
        return linears.cheapest(8 * price_at([experts], capacity))
    experts = Items(_flat(costs), _flat(np.broadcast_to(menu.nbytes, costs.shape)))
    capacity += linear_range(scores, recipe)[0]  # of all together
    price = price_at([experts, linears], capacity)
    least = menu.extremes(menu.nbytes, required_columns(recipe, menu.shape[1]))[0]
    while capacity - linears.size(linears.cheapest(price)) < least:
        price *= 2  # `at_least_one` makes experts larger than the price alone does
    return linears.cheapest(price)


def linear_costs(scores: ExpertScores, weights: Floats) -> Floats:
    """[M, W] predicted loss of each open linear at each width."""
    return weighed_sum(weights, scores.linear_cost)


def _flat(table: npt.NDArray[Any], leading: int = 0) -> npt.NDArray[Any]:
    """[..., L, E, P, B] as [..., I, B], `leading` axes kept."""
    return table.reshape(*table.shape[:leading], -1, table.shape[-1])


def pareto(scores: ExpertScores, recipe: Recipe, bits: Sequence[float]) -> list[float]:
    """Predicted loss at each average number of code bits."""
    return [plan.predicted_loss for plan in frontier(scores, recipe, bits)]


def frontier(scores: ExpertScores, recipe: Recipe, bits: Sequence[float]) -> list[BitAllocation]:
    """The best plan at each average number of code bits, whatever budget the recipe has."""
    return [allocate(scores, recipe.with_changes(bits=k, bpw=None, size=None)) for k in bits]


def check_inputs(scores: ExpertScores, recipe: Recipe) -> None:
    """Raise InputError, BudgetError or NumericalError if these scores cannot serve this recipe."""
    widths = recipe.expert_bits
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


def expert_errors(scores: ExpertScores, recipe: Recipe) -> Floats:
    """[D, L, E, P, B] cost of every item on each source of text at the offered widths."""
    columns = [scores.bits.index(b) for b in recipe.expert_bits]
    return np.asarray(scores.cost[:, :, :, _parts(recipe), columns])


def _parts(recipe: Recipe) -> slice:
    """Which of score.PARTS are items."""
    return slice(0, BOTH) if recipe.per_projection else slice(BOTH, BOTH + 1)


def check_linears(scores: ExpertScores) -> None:
    """Raise NumericalError if a linear has no width to take, or a cost that is none."""
    cost = scores.linear_cost
    offered = np.isfinite(cost).all(axis=0)
    no_number = np.isnan(cost).any(axis=0) | (cost < 0).any(axis=0)  # [M, W]
    no_size = offered & (scores.linear_bytes <= 0)
    bad = (no_number | no_size).sum(axis=1) > 0
    wrong = np.flatnonzero(bad | (offered.sum(axis=1) == 0))
    if len(wrong):
        row = int(wrong[0])
        raise NumericalError(
            f"The costs of {scores.linears[row]} are {cost[:, row].tolist()} at "
            f"{scores.linear_bytes[row].tolist()} bytes, expected numbers of at least 0 (infinite "
            "where a width is not offered). Check the model's weights for NaN and score again."
        )


def objective(scores: ExpertScores, recipe: Recipe, weights: Floats | None = None) -> Floats:
    """c [L, E, P, B]: what each width of each item adds to the predicted loss.

    "error": `scores.cost`, the predicted KL in nats per token; where scores were made without
    gradients, the squared error in the MoE block's output over the energy of the residual stream
    that the output is added to. That weighs layers against each other.

    "paper": phi^alpha w^beta epsilon^gamma, eq. 3-4 of arXiv:2410.06270.

    Args:
        weights: [D] of the sources of text; None: all alike.
    """
    if recipe.cost != "paper":
        errors = expert_errors(scores, recipe)
        return np.asarray(
            errors.sum(axis=0) if weights is None else np.tensordot(weights, errors, axes=1)
        )
    columns = [scores.bits.index(b) for b in recipe.expert_bits]
    squared = scores.squared_error[:, :, _parts(recipe), columns]
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
    return np.asarray(costs)


def uniform(recipe: Recipe, menu: Menu, sizes: Ints, capacity: int) -> Ints:
    """Every expert at the largest width that fits. [L, E, P] columns of the menu.

    Raises:
        InputError: `at_least_one` asks for another width too.
    """
    totals = math.prod(menu.shape[:2]) * sizes.sum(axis=0)  # [B]
    column = int((totals <= capacity).sum()) - 1
    if set(recipe.at_least_one) - {menu.widths[column]}:
        raise InputError(
            f"at_least_one asks for {list(recipe.at_least_one)} bits in every layer, which a "
            f"uniform {menu.widths[column]}-bit allocation has not. Set at_least_one to ()."
        )
    return np.full(menu.shape, column)


def choose(recipe: Recipe, costs: Floats, sizes: Ints, capacity: int) -> Ints:
    """Solve for the whole model, or for each layer with an equal share of the budget.

    Args:
        costs: [L, E, P, B].
        sizes: [P, B].
        capacity: of all layers together, in units of sizes.

    Returns:
        [L, E, P] the chosen columns.
    """
    count, experts, items, widths = costs.shape
    required = required_columns(recipe, experts)
    rng = np.random.default_rng(recipe.seed)
    parts = [costs] if recipe.scope == "model" else np.split(costs, count)
    choices = []
    for part in parts:
        layers = len(part)
        flat = part.reshape(-1, widths)
        each = np.tile(sizes, (layers * experts, 1))
        # Items of one layer and projection, which at_least_one counts together.
        groups = np.arange(layers * experts * items).reshape(layers, experts, items)
        members = groups.swapaxes(1, 2).reshape(layers * items, experts)
        share = capacity * layers // count
        choices.append(
            draw(each, share, members, required, rng)
            if recipe.cost == "random"
            else solve(flat, each, share, members, required)
        )
    return np.concatenate(choices).reshape(count, experts, items)


def _digits(bits: npt.NDArray[np.int8]) -> str:
    return "".join(str(b) for b in bits.tolist())
