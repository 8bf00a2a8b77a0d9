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

`solve` is exact. In four steps:

1. Lagrange. At a price p per unit of budget, items are independent: each takes the width of least
   c + p s. The sum of these minima less p C is a lower bound on every allocation, whatever p >= 0;
   the best p, found by bisection, gives the bound of the linear relaxation.
2. Incumbent. The allocations just above and just below that price differ in a few items: as many
   of them are changed as the budget allows.
3. Margins. How much the bound rises if item i takes width b: (c + p s)[i, b] less the item's least
   c + p s. A width whose margin exceeds the gap between incumbent and bound is in no better
   allocation.
4. HiGHS chooses among the widths of the smallest margins, minimising margins + p * (what is left
   of the budget): the loss above the bound. That gives a better incumbent, hence a smaller gap;
   widths are added until all that are left out exceed it. The objective is scaled so that the gap
   is OBJECTIVE_SCALE: HiGHS never has to see a small difference of large numbers, however many
   orders of magnitude the costs span. It stops within 1e-6, so a plan is proven optimal to
   1e-6 / OBJECTIVE_SCALE of a gap that is itself a small part of the loss of one item.
   Items alike in everything become one integer variable per width, which is what keeps ties (and
   models of random weights) from taking for ever.

`at_least_one` (the paper: one 2-bit and one 3-bit expert in each layer) needs distinct items to
stand for each listed width. At a given price the cheapest of them are an assignment problem, so the
bound stays exact with it. Where projections are items, it holds for the gate_up projections of a
layer and for its down projections, each by themselves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import coo_array, csr_array

from moepress.checkpoint import load_json, save_json
from moepress.codec import GROUP_SIZES
from moepress.errors import BudgetError, CheckpointError, InputError, MoepressError, NumericalError
from moepress.layout import codec_for
from moepress.recipe import Recipe

if TYPE_CHECKING:
    from moepress.score import ExpertScores

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

PROJECTIONS = ("gate_up", "down")
BOTH = 2  # index in score.PARTS of an expert quantized whole
KIND = "plan"
FIRST_CORE = 100  # columns, beside the cheapest of each item, that HiGHS is first asked about
LEAST_PRICE = 1e-200  # beside the largest cost: of columns as cheap, the smallest is taken
OBJECTIVE_SCALE = 1000.0  # what HiGHS sees of the distance between incumbent and bound
SECONDS = 300.0  # HiGHS may think this long about one program
LARGEST_COEFFICIENT = 1e7  # HiGHS works with absolute tolerances of 1e-6 and 1e-7
DRAWS = 100  # random allocations of which the one nearest below the budget is taken
PROVEN = 2e-6  # twice the gap at which HiGHS stops
ROUNDING = 1e-12  # relative: 2.1 bits of 10 weights are 21, whatever 2.1 is in binary


@dataclass(frozen=True)
class BitAllocation:
    """The plan: code bits of both projections of every routed expert. L MoE layers, E experts."""

    layers: tuple[int, ...]  # [L] index of each MoE layer in the model
    bits: npt.NDArray[np.int8]  # [L, E, 2] gate_up, down
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


class BudgetRange(NamedTuple):
    """Smallest and largest budget that makes a difference, in each unit."""

    bits: tuple[float, float]  # average code bits of the routed experts
    bpw: tuple[float, float]  # stored bits per weight of the whole model
    size: tuple[int, int]  # bytes of the folder


@dataclass(frozen=True)
class Menu:
    """What may be chosen. P items per expert: its projections, or the expert as one item.

    B widths, in rising order of bits and bytes.
    """

    shape: tuple[int, int, int]  # L, E, P
    widths: tuple[int, ...]  # [B]
    weights: Ints  # [P] weights of an item
    code_bits: Ints  # [P, B]
    nbytes: Ints  # [P, B] stored, side data and padding included

    @classmethod
    def of(cls, scores: ExpertScores, recipe: Recipe) -> Menu:
        matrices = (scores.gate_up_shape, scores.down_shape)
        weights = np.array([rows * cols for rows, cols in matrices])
        nbytes = np.array(
            [
                [
                    codec_for(b, cols, scores.group_size).nbytes(rows, cols)
                    for b in recipe.expert_bits
                ]
                for rows, cols in matrices
            ]
        )
        if not recipe.per_projection:
            weights, nbytes = weights.sum(keepdims=True), nbytes.sum(axis=0, keepdims=True)
        code_bits = weights[:, None] * np.array(recipe.expert_bits)
        count, experts = scores.tokens.shape
        shape = (count, experts, len(weights))
        return cls(shape, recipe.expert_bits, weights, code_bits, nbytes)

    @property
    def total_weights(self) -> int:
        """Weights of all routed experts."""
        return int(self.shape[0] * self.shape[1] * self.weights.sum())

    def extremes(self, sizes: Ints, required: Sequence[int]) -> tuple[int, int]:
        """Smallest and largest sum of `sizes` [P, B], with each column of `required` in use."""
        count, experts, _ = self.shape
        held = sizes[:, list(required)].sum()
        free = experts - len(required)
        low, high = (int(count * (held + free * sizes[:, b].sum())) for b in (0, -1))
        return low, high


def allocate(scores: ExpertScores, recipe: Recipe) -> BitAllocation:
    """Choose the code bits of every routed expert: least predicted loss within the budget.

    A budget above the largest possible is lowered to it, with a warning in the log.

    Args:
        scores: what each width would cost, as `moepress score` measured it.
        recipe: budget, objective (`cost`, `scope`, `per_projection`, exponents) and widths, which
            must be among the measured ones.

    Returns:
        The plan. `predicted_loss` is in units of the objective; under "random" and "uniform" it
        is what "error" would count. It cannot be compared between `per_projection` on and off:
        the errors of two projections add up to nearly, not exactly, the error of both.

    Raises:
        InputError: no budget, or scores and recipe do not fit together.
        BudgetError: the budget is too small; names the smallest and the largest possible.
        NumericalError: NaN, infinity or a negative number in the scores.
        MoepressError: HiGHS did not solve the program.
    """
    check_inputs(scores, recipe)
    menu = Menu.of(scores, recipe)
    costs = objective(scores, recipe)
    sizes = menu.code_bits if recipe.bits is not None else menu.nbytes
    capacity = expert_budget(scores, recipe, menu)
    choice = (
        uniform(recipe, menu, sizes, capacity)
        if recipe.cost == "uniform"
        else choose(recipe, costs, sizes, capacity)
    )
    expert_bytes = int(_at(menu.nbytes, choice).sum())
    total_bytes = scores.fixed_bytes + expert_bytes
    return BitAllocation(
        layers=scores.layers,
        bits=np.broadcast_to(
            np.array(menu.widths, dtype=np.int8)[choice], (*menu.shape[:2], len(PROJECTIONS))
        ),
        group_size=scores.group_size,
        predicted_loss=float(_at(costs, choice).sum()),
        expert_bytes=expert_bytes,
        total_bytes=total_bytes,
        folder_bytes=total_bytes + scores.file_bytes,
        average_bits=int(_at(menu.code_bits, choice).sum()) / menu.total_weights,
        expert_bits_per_weight=expert_bytes * 8 / menu.total_weights,
        bits_per_weight=total_bytes * 8 / (scores.fixed_weights + menu.total_weights),
        recipe=recipe,
        provenance=dict(scores.provenance),
    )


def budget_range(scores: ExpertScores, recipe: Recipe) -> BudgetRange:
    """The smallest and the largest allocation that the recipe admits, in each unit of a budget."""
    menu = Menu.of(scores, recipe)
    required = _required(recipe, menu.shape[1])
    low, high = menu.extremes(menu.nbytes, required)
    low_bits, high_bits = menu.extremes(menu.code_bits, required)
    fixed, files = scores.fixed_bytes, scores.file_bytes
    weights = scores.fixed_weights + menu.total_weights
    return BudgetRange(
        bits=(low_bits / menu.total_weights, high_bits / menu.total_weights),
        bpw=((fixed + low) * 8 / weights, (fixed + high) * 8 / weights),
        size=(fixed + files + low, fixed + files + high),
    )


def pareto(scores: ExpertScores, recipe: Recipe, bits: Sequence[float]) -> list[float]:
    """Predicted loss at each average number of code bits."""
    return [
        allocate(scores, recipe.with_changes(bits=k, bpw=None, size=None)).predicted_loss
        for k in bits
    ]


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
    for name in ("tokens", "routing_weight", "squared_error", "residual_energy"):
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


def objective(scores: ExpertScores, recipe: Recipe) -> Floats:
    """c [L, E, P, B]: what each width of each item adds to the predicted loss.

    "error": the squared error it makes in the MoE block's output, over the energy of the residual
    stream that the output is added to. The division weighs layers against each other; within a
    layer it changes nothing.

    "paper": phi^alpha w^beta epsilon^gamma, eq. 3-4 of arXiv:2410.06270.
    """
    columns = [scores.bits.index(b) for b in recipe.expert_bits]
    parts = slice(0, BOTH) if recipe.per_projection else slice(BOTH, BOTH + 1)
    squared = scores.squared_error[:, :, parts, columns]
    if recipe.cost != "paper":
        return np.asarray(squared / scores.residual_energy[:, None, None, None])
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


def expert_budget(scores: ExpertScores, recipe: Recipe, menu: Menu) -> int:
    """What routed experts may use: code bits under a budget of `bits`, bytes under the others.

    Raises:
        InputError: no budget is set.
        BudgetError: it is below the smallest possible.
    """
    possible = budget_range(scores, recipe)._asdict()
    unit = next((unit for unit in possible if getattr(recipe, unit) is not None), None)
    if unit is None:
        raise InputError("No budget. Set one of bits (say 2.5), bpw, or size.")
    low, high = possible[unit]
    asked: float = getattr(recipe, unit)
    if asked > high:
        logger.warning(
            "%s %g is above the largest possible, %s: that is used", unit, asked, _down(high)
        )
    budget: float = min(asked, high)
    if unit == "bits":
        capacity = math.floor(budget * menu.total_weights * (1 + ROUNDING))
    elif unit == "bpw":
        weights = scores.fixed_weights + menu.total_weights
        capacity = math.floor(budget * weights / 8 * (1 + ROUNDING)) - scores.fixed_bytes
    else:
        capacity = math.floor(budget) - scores.fixed_bytes - scores.file_bytes
    sizes = menu.code_bits if unit == "bits" else menu.nbytes
    if capacity < menu.extremes(sizes, _required(recipe, menu.shape[1]))[0]:
        raise BudgetError(
            f"{unit} {asked} is impossible: with expert_bits {list(recipe.expert_bits)} and group "
            f"size {scores.group_size} the smallest is {_up(low)} and the largest {_down(high)}. "
            "Raise the budget, or offer smaller widths."
        )
    return capacity


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
    required = _required(recipe, experts)
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


# --- the exact solver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Knapsack:
    """The program in units of its own: excess costs within [0, 1], excess sizes in their gcd."""

    excess: Floats  # [I, B] cost above the item's cheapest width
    sizes: Ints  # [I, B] size above the item's smallest width
    capacity: int
    members: Ints  # [G, M] items of each group
    required: tuple[int, ...]  # columns that each group uses at least once

    @classmethod
    def of(
        cls, costs: Floats, sizes: Ints, capacity: int, members: Ints, required: Sequence[int]
    ) -> _Knapsack:
        excess = costs - costs.min(axis=1, keepdims=True)
        smallest = sizes.min(axis=1, keepdims=True)
        unit = int(np.gcd.reduce(sizes - smallest, axis=None)) or 1
        return cls(
            excess / (excess.max() or 1.0),
            (sizes - smallest) // unit,
            (capacity - int(smallest.sum())) // unit,
            members,
            tuple(required),
        )

    def room(self, choice: Ints) -> int:
        """What a choice leaves of the budget."""
        return self.capacity - int(_at(self.sizes, choice).sum())

    def group_of(self) -> Ints:
        """[I] group of each item; 0 where groups do not matter."""
        groups = np.zeros(len(self.sizes), dtype=np.int64)
        if self.required:
            groups[self.members] = np.arange(len(self.members))[:, None]
        return groups

    def at_price(self, price: float) -> tuple[Ints, Floats]:
        """The cheapest choice [I] if budget costs `price` a unit, and reduced costs [I, B]."""
        total = self.excess + price * self.sizes
        choice = total.argmin(axis=1)
        reduced = total - total.min(axis=1, keepdims=True)
        for items in self.members if self.required else ():
            offers = reduced[items][:, list(self.required)]
            rows, columns = linear_sum_assignment(offers)
            choice[items[rows]] = np.array(self.required)[columns]
        return choice, reduced

    def representatives(self, choice: Ints) -> Mask:
        """[I] one item for each group and required column: these must not change."""
        held = np.zeros(len(choice), dtype=np.bool_)
        for column in self.required:
            found = choice[self.members] == column
            held[self.members[np.arange(len(found)), found.argmax(axis=1)]] = True
        return held

    def cover_cost(self, reduced: Floats, left_out: int | None = None) -> Floats:
        """[G] how much the bound rises because each group uses its required columns."""
        columns = [c for c in self.required if c != left_out]
        rises = np.zeros(len(self.members))
        for group, items in enumerate(self.members if columns else ()):
            offers = reduced[items][:, columns]
            rises[group] = offers[linear_sum_assignment(offers)].sum()
        return rises


def solve(
    costs: Floats,
    sizes: Ints,
    capacity: int,
    members: Ints | None = None,
    required: Sequence[int] = (),
) -> Ints:
    """Choose one column for each item: least sum of costs, sum of sizes at most `capacity`. Exact.

    Args:
        costs: [I, B] finite float64.
        sizes: [I, B] int64, at least 0.
        capacity: in units of sizes; some choice must fit.
        members: [G, M] items of each group, needed with `required`.
        required: columns that every group has to use at least once.

    Returns:
        [I] the chosen columns; the same for the same input. Room that is left is spent on columns
        of equal cost.

    Raises:
        MoepressError: HiGHS failed or ran out of time.
    """
    groups = np.empty((0, 0), dtype=np.int64) if members is None else members
    problem = _Knapsack.of(costs, sizes, capacity, groups, required)
    return _spend_freely(problem, _solve(problem))


def _solve(problem: _Knapsack) -> Ints:
    choice, _ = problem.at_price(LEAST_PRICE)
    if problem.room(choice) >= 0:
        return choice  # the budget does not bind
    price, below, above = _best_price(problem)
    incumbent = _towards(problem, above, below)
    _, reduced = problem.at_price(price)
    rises = problem.cover_cost(reduced)
    bound = rises.sum() * (1 - ROUNDING)  # of two sums, one may be rounded up and the other down
    gap = _loss(problem, incumbent, reduced, price) - bound
    margin = _margin(problem, reduced, rises)
    core = FIRST_CORE
    while gap > 0:
        threshold = min(gap, _smallest(margin, len(margin) + core))
        candidates = margin <= threshold
        candidates[np.arange(len(incumbent)), incumbent] = True
        found = _highs(problem, reduced, price, gap, candidates)
        found_gap = _loss(problem, found, reduced, price) - bound
        if found_gap < gap:
            incumbent, gap = found, found_gap
        if gap <= threshold:
            break  # no column left out could improve on it
        core = 4 * max(core, int(candidates.sum()) - len(margin))
    return incumbent


def _best_price(problem: _Knapsack) -> tuple[float, Ints, Ints]:
    """The price at which the budget is just met, and the choices just below and just above it."""
    high = 1.0
    while problem.room(problem.at_price(high)[0]) < 0:
        high *= 2
    low = high
    while problem.room(problem.at_price(low)[0]) >= 0:
        high, low = low, max(low / 2, LEAST_PRICE)
    while low < (middle := (low + high) / 2) < high:
        if problem.room(problem.at_price(middle)[0]) >= 0:
            high = middle
        else:
            low = middle
    return high, problem.at_price(low)[0], problem.at_price(high)[0]


def _towards(problem: _Knapsack, start: Ints, end: Ints) -> Ints:
    """`start` with as many of its items as fit, first ones first, changed to what `end` has."""
    change = _at(problem.sizes, end) - _at(problem.sizes, start)
    change[problem.representatives(start)] = 0
    items = np.flatnonzero(change)
    fits = np.cumsum(change[items]) <= problem.room(start)
    items = items[: len(items) if fits.all() else int(fits.argmin())]
    choice = start.copy()
    choice[items] = end[items]
    return choice


def _loss(problem: _Knapsack, choice: Ints, reduced: Floats, price: float) -> float:
    """Cost of a choice above the Lagrangian bound without required columns; no cancellation."""
    return float(_at(reduced, choice).sum() + price * problem.room(choice))


def _margin(problem: _Knapsack, reduced: Floats, rises: Floats) -> Floats:
    """[I, B] how much the bound rises if an item takes a column.

    Its reduced cost; but a required column serves its group too, which saves what the group
    has to pay for that column anyway.
    """
    margin = reduced.copy()
    for column in problem.required:
        saved = rises - problem.cover_cost(reduced, left_out=column)  # [G]
        margin[problem.members, column] -= saved[:, None]
    return margin


def _smallest(values: Floats, count: int) -> float:
    """The count-th smallest value; infinity if there are no more than that."""
    flat = values.ravel()
    return float(np.partition(flat, count - 1)[count - 1]) if count < len(flat) else math.inf


def _highs(problem: _Knapsack, reduced: Floats, price: float, gap: float, candidates: Mask) -> Ints:
    """HiGHS on the items that still have a choice; equal items are one integer variable a column.

    Returns:
        [I] the best choice among the candidates.
    """
    choice: Ints = candidates.argmax(axis=1)
    is_open = candidates.sum(axis=1) > 1
    items = np.flatnonzero(is_open)
    offered = np.where(candidates, reduced, np.inf)[items]
    group = problem.group_of()[items]
    alike = np.column_stack([offered, problem.sizes[items], group])
    _, first, kind, count = np.unique(
        alike, axis=0, return_index=True, return_inverse=True, return_counts=True
    )  # K kinds of open items
    rows, columns = np.nonzero(np.isfinite(offered[first]))  # [V] one variable each
    variables = len(rows)
    capacity = problem.capacity - int(_at(problem.sizes, choice)[~is_open].sum())
    sizes = problem.sizes[items[first]][rows, columns]
    # The last variable is the room that is left.
    constraints = [
        LinearConstraint(
            _ones(rows, np.arange(variables), (len(first), variables + 1)), count, count
        ),
        LinearConstraint(np.append(sizes, 1)[None, :].astype(float), capacity, capacity),
    ]
    for column in problem.required:
        covered = (~is_open & (choice == column))[problem.members].any(axis=1)  # [G]
        here = np.flatnonzero(columns == column)
        cover = _ones(group[first][rows[here]], here, (len(covered), variables + 1))
        constraints.append(LinearConstraint(cover, 1.0 - covered, np.inf))
    # Room that costs more than the gap is in no better choice.
    most_room = math.floor(min(gap / price * (1 + ROUNDING), capacity))
    loss = np.append(offered[first][rows, columns], price if most_room else 0.0)
    taken = _proven_optimum(
        loss * min(OBJECTIVE_SCALE / gap, LARGEST_COEFFICIENT / loss.max()),
        Bounds(0, np.append(count[rows], most_room)),
        constraints,
    )[:-1]
    if (np.bincount(rows, taken, len(first)) != count).any():
        raise MoepressError(
            "HiGHS returned no width or several for an item. Expected exactly one: please report."
        )
    # Items of one kind, in order, get the widths of that kind, in order.
    choice[items[np.argsort(kind.ravel(), kind="stable")]] = np.repeat(columns, taken)
    if problem.room(choice) < 0:
        raise MoepressError(
            f"HiGHS overran the budget by {-problem.room(choice)} units: please report."
        )
    logger.debug("HiGHS decided %d items in %d variables", len(items), variables)
    return choice


def _proven_optimum(loss: Floats, bounds: Bounds, constraints: list[LinearConstraint]) -> Ints:
    """The integers of least loss, and HiGHS's word for it.

    HiGHS 1.12 can lose its lower bound when it restarts after presolve, and still say "optimal"
    (the restarts that its issue 2783 is about). What it has not proven is done without presolve.
    """
    for presolve in (True, False):
        result = milp(
            loss,
            integrality=np.ones(len(loss), dtype=np.int64),
            bounds=bounds,
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS, "presolve": presolve},
        )
        if result.status != 0 or result.x is None:
            break
        if abs(result.fun - result.mip_dual_bound) <= PROVEN + ROUNDING * abs(result.fun):
            return np.rint(result.x).astype(np.int64)
    raise MoepressError(
        f"HiGHS did not solve the allocation: {len(loss)} variables, at most {SECONDS:.0f} s, says "
        f"'{result.message}' Try a slightly different budget, or scope 'layer'."
    )


def _ones(rows: Ints, columns: Ints, shape: tuple[int, int]) -> csr_array:
    """The matrix [shape] of zeros with a one at each of these places."""
    return coo_array((np.ones(len(rows)), (rows, columns)), shape).tocsr()


def _spend_freely(problem: _Knapsack, choice: Ints) -> Ints:
    """Spend what is left of the budget on larger widths of equal cost, smallest steps first."""
    choice = choice.copy()
    held = problem.representatives(choice)
    never = np.iinfo(np.int64).max
    while True:
        room = problem.room(choice)
        extra = problem.sizes - _at(problem.sizes, choice)[:, None]
        equal = problem.excess == _at(problem.excess, choice)[:, None]
        step = np.where(equal & (extra > 0) & (extra <= room) & ~held[:, None], extra, never)
        smallest = step.min(axis=1)
        items = np.argsort(smallest, kind="stable")[: int((smallest < never).sum())]
        if not len(items):
            return choice
        items = items[np.cumsum(smallest[items]) <= room]
        choice[items] = step[items].argmin(axis=1)


# --- random allocation, to compare with ---------------------------------------------------------


def draw(
    sizes: Ints, capacity: int, members: Ints, required: Sequence[int], rng: np.random.Generator
) -> Ints:
    """A fair random allocation: each one that just meets the budget is (nearly) as likely.

    Random costs given to the solver would not do: it would still avoid what is expensive for its
    size, so the mix of widths would be the solver's. Instead every item draws its width alone, with
    chances proportional to exp(-price * size), at the price where the expected size is the budget:
    all allocations of one size are then equally likely. Of DRAWS such allocations, the largest that
    fits is taken. What it misses the budget by is made up for by single steps of random items,
    until no step up fits.

    Args:
        sizes: [I, B] int64, rising along B.
        capacity: in units of sizes.
        members: [G, M] items of each group.
        required: columns that every group has to use at least once.
        rng: source of chance; the same state gives the same allocation.

    Returns:
        [I] the chosen columns.
    """
    ends = _chances(sizes, capacity).cumsum(axis=1)[:, :-1]
    drawn = []
    for _ in range(DRAWS):
        choice: Ints = (rng.random((len(sizes), 1)) > ends).sum(axis=1)
        free = np.ones(len(sizes), dtype=np.bool_)
        for items in members if required else ():
            held = rng.choice(items, len(required), replace=False)
            choice[held] = required
            free[held] = False
        over = int(_at(sizes, choice).sum()) - capacity
        drawn.append((over > 0, abs(over), choice, free))
    _, _, choice, free = min(drawn, key=lambda one: one[:2])
    return _tighten(choice, free, sizes, capacity, rng)


def _tighten(
    choice: Ints, free: Mask, sizes: Ints, capacity: int, rng: np.random.Generator
) -> Ints:
    """Single steps of random free items: down until the budget is met, up while one fits."""
    choice = choice.copy()
    used = int(_at(sizes, choice).sum())
    for step in (-1, 1):
        moved = True
        while moved:
            moved = False
            for item in rng.permutation(np.flatnonzero(free)):
                to = choice[item] + step
                if (step < 0 and used <= capacity) or not 0 <= to < sizes.shape[1]:
                    continue
                after = used + int(sizes[item, to] - sizes[item, choice[item]])
                if step < 0 or after <= capacity:
                    choice[item], used, moved = to, after, True
    return choice


def _chances(sizes: Ints, capacity: int) -> Floats:
    """[I, B] chances proportional to exp(-price * size) whose expected size is the budget."""
    scaled = (sizes - sizes.mean(axis=1, keepdims=True)) / max(float(np.ptp(sizes)), 1.0)

    def chances(price: float) -> Floats:
        weight = np.exp(-price * scaled - (-price * scaled).max(axis=1, keepdims=True))
        return np.asarray(weight / weight.sum(axis=1, keepdims=True))

    low, high = -1000.0, 1000.0  # where all items take one width
    for _ in range(60):
        price = (low + high) / 2
        if (chances(price) * sizes).sum() > capacity:
            low = price
        else:
            high = price
    return chances(high)


# --- small things -------------------------------------------------------------------------------


def _at(table: npt.NDArray[Any], choice: Ints) -> npt.NDArray[Any]:
    """table[..., choice] along its last axis; [P, B] tables serve all layers and experts."""
    full = np.broadcast_to(table, (*choice.shape, table.shape[-1]))
    return np.take_along_axis(full, choice[..., None], axis=-1)[..., 0]


def _required(recipe: Recipe, experts: int) -> tuple[int, ...]:
    """Columns of the widths that every layer must use; none where all experts are to be alike."""
    required = tuple(recipe.expert_bits.index(b) for b in sorted(set(recipe.at_least_one)))
    if recipe.cost == "uniform":
        return ()
    if len(required) > experts:
        raise InputError(
            f"at_least_one asks for {len(required)} widths in every layer, but a layer has "
            f"{experts} experts. Ask for fewer."
        )
    return required


def _digits(bits: npt.NDArray[np.int8]) -> str:
    return "".join(str(b) for b in bits.tolist())


def _up(number: float) -> str:
    """Rounded so that the number named is itself possible."""
    return str(number) if isinstance(number, int) else f"{math.ceil(number * 1e4) / 1e4:.4f}"


def _down(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{math.floor(number * 1e4) / 1e4:.4f}"
