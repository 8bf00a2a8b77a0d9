"""The allocator against brute force: every allocation of a small model, tried one by one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult

from moepress import allocate as allocate_from_package
from moepress.allocate import allocate, frontier
from moepress.allocation import highs
from moepress.allocation.budget import budget_range
from moepress.allocation.knapsack import solve
from moepress.allocation.plan import BitAllocation
from moepress.allocation.random_plan import _tighten as tighten
from moepress.allocation.random_plan import draw
from moepress.costs.scores import ExpertScores
from moepress.errors import BudgetError, CheckpointError, InputError, MoepressError, NumericalError
from moepress.format.codec import Codec
from moepress.recipe import Recipe

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def scalar(**changes: Any) -> Recipe:
    """Scalar codes of 1 to 3 bits, and linears at fixed widths."""
    return Recipe.load("fast", **{"expert_bits": (1, 2, 3), **changes})


def make_scores(
    seed: int = 0,
    layers: tuple[int, ...] = (1, 3),
    experts: int = 2,
    bits: tuple[int, ...] = (1, 2, 3),
    **changes: Any,
) -> ExpertScores:
    """Scores of a model that does not exist. 40 rows are no multiple of a block's 16."""
    rng = np.random.default_rng(seed)
    count = len(layers)
    scale = np.exp(rng.normal(0, 1.5, (count, experts, 1, 1)))
    noise = np.exp(rng.normal(0, 0.2, (count, experts, 3, len(bits))))
    fields: dict[str, Any] = {
        "layers": layers,
        "bits": bits,
        "tokens": rng.integers(1, 500, (count, experts)),
        "routing_weight": rng.random((count, experts)) * 200,
        "squared_error": scale * noise * 4.0 ** -np.array(bits),
        "output_energy": rng.random(count) + 1,
        "residual_energy": 10.0 ** np.arange(count) * 3,
        "total_tokens": 1000,
        "gate_up_shape": (96, 128),  # without a gate
        "down_shape": (128, 96),  # 128 does not divide 96: its groups are of 32
        "fixed_bytes": 5000,
        "other_weights": 3000,
        "file_bytes": 700,
        "group_size": 128,
        "provenance": {"model": "none", "model_fingerprint": "abc"},
    }
    fields |= changes
    return ExpertScores(**costs_of(fields) | fields)


def costs_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What follows from errors where no gradients were measured; no open linears."""
    residual = fields["residual_energy"][:, None, None, None]
    with np.errstate(all="ignore"):
        cost = fields["squared_error"] / residual
    return {
        "cost": cost[None],
        "text_tokens": (fields["total_tokens"],),
        "linears": (),
        "linear_bits": (),
        "linear_bytes": np.zeros((0, 0), dtype=np.int64),
        "linear_cost": np.zeros((1, 0, 0)),
    }


# --- the oracle: all allocations, from the definitions ------------------------------------------


def every_allocation(scores: ExpertScores, recipe: Recipe) -> list[Ints]:
    """All [L, E, 2] widths that the recipe admits, its budget aside."""
    count, experts = scores.tokens.shape
    per_expert = [
        (a, b)
        for a, b in itertools.product(recipe.expert_bits, repeat=2)
        if recipe.per_projection or a == b
    ]
    found = []
    for plan in itertools.product(per_expert, repeat=count * experts):
        bits = np.array(plan).reshape(count, experts, 2)
        if all(
            set(recipe.at_least_one) <= set(bits[row, :, p]) for row in range(count) for p in (0, 1)
        ):
            found.append(bits)
    return found


def measure(scores: ExpertScores, recipe: Recipe, bits: Ints) -> tuple[Floats, Ints, Ints]:
    """Loss, code bits and bytes of each layer [L]."""
    count, experts = scores.tokens.shape
    loss, code, stored = np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64)
    shapes, groups = (scores.gate_up_shape, scores.down_shape), (128, 32)
    for row, expert in itertools.product(range(count), range(experts)):
        for part, ((rows, cols), group) in enumerate(zip(shapes, groups, strict=True)):
            width = int(bits[row, expert, part])
            code[row] += width * rows * cols
            stored[row] += Codec(width, group).nbytes(rows, cols)
            if recipe.per_projection:
                error = scores.squared_error[row, expert, part, scores.bits.index(width)]
                loss[row] += cost(scores, recipe, row, expert, error)
        if not recipe.per_projection:
            error = scores.squared_error[row, expert, 2, scores.bits.index(width)]
            loss[row] += cost(scores, recipe, row, expert, error)
    return loss, code, stored


def cost(scores: ExpertScores, recipe: Recipe, row: int, expert: int, error: float) -> float:
    if recipe.cost != "paper":
        return error / scores.residual_energy[row]
    phi = scores.tokens[row, expert] / scores.total_tokens
    w = scores.routing_weight[row, expert] / scores.total_tokens
    return float(phi**recipe.alpha * w**recipe.beta * np.sqrt(error) ** recipe.gamma)


def within(scores: ExpertScores, recipe: Recipe, code: Ints, stored: Ints) -> bool:
    """Whether the budget holds, for the model or for each layer alone."""
    count, experts = scores.tokens.shape
    weights = count * experts * (96 * 128 + 128 * 96)
    if recipe.bits is not None:
        used, most = code, recipe.bits * weights
    elif recipe.bpw is not None:
        used = stored
        most = recipe.bpw * (weights + scores.other_weights) / 8 - scores.fixed_bytes
    else:
        assert recipe.size is not None
        used, most = stored, recipe.size - scores.fixed_bytes - scores.file_bytes
    if recipe.scope == "layer":
        return bool((used <= most / count + 1e-6).all())
    return bool(used.sum() <= most + 1e-6)


def least_loss(scores: ExpertScores, recipe: Recipe) -> float | None:
    """The smallest loss within the budget, by trying all; None if nothing fits."""
    losses = [
        loss.sum()
        for bits in every_allocation(scores, recipe)
        for loss, code, stored in [measure(scores, recipe, bits)]
        if within(scores, recipe, code, stored)
    ]
    return min(losses, default=None)


BUDGETS = [{"bits": 1.6}, {"bits": 2.31}, {"bpw": 3.2}, {"size": 30_000}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize(
    ("cost", "per_projection", "at_least_one"),
    [
        ("error", True, ()),
        ("error", False, ()),
        ("error", True, (3,)),
        ("paper", False, (1, 2)),
        ("paper", True, (2, 1)),
    ],
)
def test_least_loss_within_the_budget(
    budget: dict[str, Any], scope: str, cost: str, per_projection: bool, at_least_one: tuple[int]
) -> None:
    scores = make_scores(seed=len(scope) + len(str(budget)))
    recipe = scalar(
        **budget,
        scope=scope,  # type: ignore[arg-type]  # a parameter
        cost=cost,  # type: ignore[arg-type]  # a parameter
        per_projection=per_projection,
        at_least_one=at_least_one,
    )
    least = least_loss(scores, recipe)
    if least is None:
        with pytest.raises(BudgetError):
            allocate(scores, recipe)
        return
    plan = allocate(scores, recipe)
    loss, code, stored = measure(scores, recipe, plan.bits.astype(np.int64))
    assert within(scores, recipe, code, stored)
    for row, part in itertools.product(range(2), range(2)):
        assert set(at_least_one) <= set(plan.bits[row, :, part].tolist())
    assert plan.predicted_loss == pytest.approx(least, rel=1e-12)
    assert loss.sum() == pytest.approx(least, rel=1e-12)
    assert plan.expert_bytes == stored.sum()
    assert plan.total_bytes == stored.sum() + 5000
    assert plan.folder_bytes == plan.total_bytes + 700
    weights = 4 * (96 * 128 + 128 * 96)
    assert plan.average_bits == pytest.approx(code.sum() / weights)
    assert plan.expert_bits_per_weight == pytest.approx(stored.sum() * 8 / weights)
    assert plan.bits_per_weight == pytest.approx(plan.total_bytes * 8 / (weights + 3000))


def test_solving_prints_nothing_of_its_own() -> None:
    """HiGHS does, for a few of these: `--json` must stay JSON."""
    code = """
from tests.test_allocate import make_scores, scalar
from moepress.allocate import allocate
print("before")
for seed in range(4):
    scores = make_scores(seed, layers=tuple(range(12)), experts=32, bits=(0, 1, 2, 3))
    allocate(scores, scalar(bits=1.3, expert_bits=(0, 1, 2, 3)))
print("after")
"""
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout == "before\nafter\n", run.stderr


# --- the solver ---------------------------------------------------------------------------------


def brute(costs: Floats, sizes: Ints, capacity: int, members: Ints, required: list[int]) -> float:
    items, widths = costs.shape
    every = np.array(list(itertools.product(range(widths), repeat=items)))
    fits = sizes[np.arange(items), every].sum(axis=1) <= capacity
    for group in members:
        for column in required:
            fits &= (every[:, group] == column).any(axis=1)
    return float(costs[np.arange(items), every].sum(axis=1)[fits].min(initial=np.inf))


@st.composite
def programs(draw_: st.DrawFn) -> tuple[Floats, Ints, int, Ints, list[int]]:
    """Small knapsacks: ties, zeros, costs of many magnitudes, that rise or do not with size."""
    widths = draw_(st.integers(1, 4))
    groups, size = draw_(st.sampled_from([(1, 1), (1, 3), (2, 2), (1, 5), (2, 3), (3, 2)]))
    items = groups * size
    number = draw_(
        st.sampled_from(
            [
                st.integers(0, 3).map(float),
                st.floats(0, 1).map(lambda x: x if x > 1e-100 else 0.0),
                st.floats(-12, 12).map(lambda x: 10.0**x),
                st.sampled_from([0.0, 0.0, 1.0, 1e9]),
            ]
        )
    )
    costs = draw_(st.lists(number, min_size=items * widths, max_size=items * widths))
    steps = draw_(st.lists(st.integers(0, 9), min_size=items * widths, max_size=items * widths))
    sizes = np.cumsum(np.array(steps).reshape(items, widths), axis=1) * draw_(
        st.sampled_from([1, 64, 10**7])
    )
    required = draw_(st.sets(st.integers(0, widths - 1), max_size=min(size, widths)))
    share = draw_(st.floats(0, 1.05))
    low, high = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    members = np.array(draw_(st.permutations(range(items)))).reshape(groups, size)
    capacity = low + int(share * (high - low))
    return np.array(costs).reshape(items, widths), sizes, capacity, members, sorted(required)


@settings(max_examples=200, deadline=None)
@given(programs())
def test_solve_is_exact(program: tuple[Floats, Ints, int, Ints, list[int]]) -> None:
    check_exact(*program)


@pytest.mark.parametrize("first_core", [1, 100])
def test_solve_is_exact_on_measured_looking_costs(
    first_core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that fall by about 4 a bit, with groups that have to use some widths."""
    monkeypatch.setitem(solve.__globals__, "FIRST_CORE", first_core)
    rng = np.random.default_rng(first_core)
    for _ in range(250):
        groups, size, widths = ((2, 3, 3), (1, 6, 3), (3, 2, 3), (2, 2, 5))[rng.integers(4)]
        items = groups * size
        costs = np.exp(rng.normal(0, 2, (items, 1)) + rng.normal(0, 0.7, (items, widths)))
        costs *= 4.0 ** -np.arange(widths)
        costs[rng.random(items) < 0.2] = 0  # no tokens
        sizes = np.cumsum(rng.integers(1, 9, (groups, widths)), axis=1).repeat(size, axis=0)
        if rng.random() < 0.3:  # all alike, in all groups
            costs[:], sizes[:] = costs[0], sizes[0]
        required = rng.choice(
            widths, rng.integers(0, min(size, widths) + 1), replace=False
        ).tolist()
        members = np.arange(items).reshape(groups, size)
        capacity = int(rng.integers(sizes[:, 0].sum(), sizes[:, -1].sum() + 1))
        with np.errstate(all="raise"):
            check_exact(costs, sizes, capacity, members, required)


def check_exact(
    costs: Floats, sizes: Ints, capacity: int, members: Ints, required: list[int]
) -> None:
    least = brute(costs, sizes, capacity, members, required)
    if least == np.inf:
        return
    choice = solve(costs, sizes, capacity, members, required)
    items = np.arange(len(choice))
    assert sizes[items, choice].sum() <= capacity
    assert all((choice[group] == column).any() for group in members for column in required)
    assert costs[items, choice].sum() <= least * (1 + 1e-9)


def test_a_cost_of_another_magnitude_hides_nothing() -> None:
    """Beside a cost of 1e12, savings below 1e-8 are still found, and exactly."""
    costs = np.array([[5e-9, 0.0], [3e-9, 0.0], [2.9e-9, 0.0], [1e12, 0.0]])
    sizes = np.array([[0, 3], [0, 2], [0, 2], [0, 1]])
    assert solve(costs, sizes, 3).tolist() == [0, 1, 0, 1]
    assert solve(costs, sizes, 4).tolist() == [1, 0, 0, 1]
    assert solve(costs, sizes, 5).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(("cost", "size", "capacity"), [(0.35, 4, 3), (0.05, 7, 6), (0.2, 7, 3)])
def test_the_whole_budget_may_stay_unused(cost: float, size: int, capacity: int) -> None:
    """The gap is then price * capacity, and in floats that divided by the price is less than it.

    HiGHS must be allowed the whole capacity as room nevertheless, or it finds no choice at all.
    Only the small width of the first item fits. The second item makes the unit of sizes 1.
    """
    costs, sizes = np.array([[cost, 0.0], [0.0, 1.0]]), np.array([[0, size], [0, 1]])
    assert solve(costs, sizes, capacity).tolist() == [0, 0]


@pytest.mark.parametrize("cost", [1e-9, 3e-9, 7e-9, 1e-8])
def test_the_cost_of_required_widths_does_not_hide_what_the_room_costs(cost: float) -> None:
    """The bound is that of the required width, 1. What the unused budget costs is far below it.

    Their sum less the bound may be less than the cost of the room by a rounding of the sum. As a
    gap that would not admit the room, and HiGHS would find no choice at all. In the only choice
    that fits, the second item has the required width and the first its smallest.
    """
    costs, sizes = np.array([[cost, 0.0, 1.0], [0.0, 1.0, 1.0]]), np.array([[0, 4, 9], [0, 1, 2]])
    assert solve(costs, sizes, 5, np.array([[0, 1]]), [2]).tolist() == [0, 2]


def test_a_width_of_more_bytes_and_more_error_is_not_taken() -> None:
    costs = np.array([[2.0, 1.0, 1.5], [2.0, 1.0, 0.5]])
    assert solve(costs, np.tile([1, 2, 3], (2, 1)), 100).tolist() == [1, 2]


def test_the_rest_of_the_budget_goes_to_widths_that_cost_nothing() -> None:
    costs = np.array([[2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    sizes = np.tile([1, 3], (4, 1))
    assert solve(costs, sizes, 10).tolist() == [1, 1, 1, 0]  # 6 units of room, 2 each
    assert solve(costs, sizes, 5).tolist() == [0, 0, 0, 0]
    assert solve(costs, sizes, 6).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["spread", "equal", "few values"])
def test_large_programs(kind: str) -> None:
    """Better than 300 exchanges can make it; same input, same plan. Prints how long it took."""
    rng = np.random.default_rng(1)
    items, widths = 48 * 128 * 2, np.arange(1, 4)
    costs = np.exp(rng.normal(0, 3, (items, 1))) * 4.0**-widths
    if kind == "spread":
        costs *= np.exp(rng.normal(0, 0.3, costs.shape))
        costs[rng.random(items) < 0.1] = 0
    elif kind == "equal":
        costs = np.tile(4.0**-widths, (items, 1))
    else:
        costs = -np.sort(-rng.integers(0, 6, costs.shape).astype(float), axis=1)
    sizes = np.array([[2], [1]])[np.arange(items) % 2] * np.array([19, 35, 51])
    capacity = int(2.513 / 2 * sizes[:, 1].sum())
    start = time.perf_counter()
    choice = solve(costs, sizes, capacity)
    print(f"\n{kind}: {items} items, {len(widths)} widths in {time.perf_counter() - start:.2f} s")
    every = np.arange(items)
    room = capacity - int(sizes[every, choice].sum())
    assert room >= 0
    assert choice.tolist() == solve(costs, sizes, capacity).tolist()
    gain = costs[every, choice][:, None] - costs  # of each single change
    extra = sizes - sizes[every, choice][:, None]
    assert gain[extra <= room].max() <= 0
    for item in rng.choice(items, 300, replace=False):  # that change, and any other with it
        for to in range(len(widths)):
            others = extra <= room - extra[item, to]
            others[item] = False
            assert gain[item, to] + gain[others].max(initial=-np.inf) <= 1e-12


def test_highs_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> OptimizeResult:
        return OptimizeResult(status=1, x=None, message="Time limit reached.")

    monkeypatch.setattr(highs, "milp", fails)
    costs, sizes = (
        np.array([[5.0, 0.0], [3.0, 0.0], [3.0, 0.0]]),
        np.array([[0, 3], [0, 2], [0, 2]]),
    )
    with pytest.raises(MoepressError, match=r"HiGHS did not solve.*Time limit reached"):
        solve(costs, sizes, 4)


def test_an_optimum_that_highs_has_not_proven_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = highs.milp
    tries = []

    def forgets(*args: Any, **options: Any) -> OptimizeResult:
        tries.append(options["options"]["presolve"])
        result = real(*args, **options)
        if not tries[-1]:
            result.mip_dual_bound = -1e6
        return result

    monkeypatch.setattr(highs, "milp", forgets)
    costs, sizes = (
        np.array([[5.0, 0.0], [3.0, 0.0], [3.0, 0.0]]),
        np.array([[0, 3], [0, 2], [0, 2]]),
    )
    assert solve(costs, sizes, 4).tolist() == [0, 1, 1]
    assert tries == [False, True]


# --- objectives and knobs -----------------------------------------------------------------------


def test_layers_are_weighed_by_the_residual_stream() -> None:
    errors = np.tile([9.0, 3.0, 1.0], (2, 2, 3, 1))
    scores = make_scores(squared_error=errors, residual_energy=np.array([1.0, 50.0]))
    plan = allocate(scores, scalar(bits=2, scope="model", per_projection=False))
    assert plan.bits[0].tolist() == [[3, 3], [3, 3]]
    assert plan.bits[1].tolist() == [[1, 1], [1, 1]]
    plan = allocate(scores, scalar(bits=2, scope="layer", per_projection=False))
    assert plan.bits.sum(axis=(1, 2)).tolist() == [8, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {"cost": "paper"},
        {"cost": "random"},
        {"scope": "layer"},
        {"per_projection": False},
        {"cost": "paper", "alpha": 3.0},
        {"cost": "paper", "beta": 3.0},
        {"cost": "paper", "gamma": 0.3},
        {"cost": "random", "seed": 5},
        {"at_least_one": (1,)},
        {"expert_bits": (1, 3)},
        {"bits": 2.2},
    ],
    ids=str,
)
def test_every_field_of_the_recipe_has_an_effect(changes: dict[str, Any]) -> None:
    scores = make_scores(seed=3, layers=(0, 1, 2), experts=8)
    base = (
        {"bits": 2.4, "cost": changes.get("cost", "error")} if len(changes) > 1 else {"bits": 2.4}
    )
    before, after = scalar(**base), scalar(**{**base, **changes})
    assert allocate(scores, before).bits.tolist() != allocate(scores, after).bits.tolist()


def test_the_paper_recipe() -> None:
    """Eight experts, k = 1.5, one 2-bit and one 3-bit: 5 x 1, 2 x 2, 1 x 3 is the only mix."""
    scores = make_scores(layers=tuple(range(6)), experts=8)
    plan = allocate(scores, Recipe.load("paper", bits=1.5))
    assert (plan.bits[..., 0] == plan.bits[..., 1]).all()
    for row in plan.bits[..., 0]:
        assert Counter(row.tolist()) == {1: 5, 2: 2, 3: 1}


def test_experts_without_tokens_under_the_paper_cost() -> None:
    tokens = np.array([[0, 100], [50, 0]])
    scores = make_scores(tokens=tokens, routing_weight=tokens * 0.5)
    plan = allocate(scores, Recipe.load("paper", bits=2, at_least_one=()))
    assert plan.bits[..., 0].tolist() == [[1, 3], [3, 1]]


@pytest.mark.parametrize("per_projection", [True, False])
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("at_least_one", [(), (1, 3)])
@pytest.mark.parametrize("bits", [1.32, 2.0, 2.61])
def test_random_is_tight_and_seeded(
    per_projection: bool, scope: str, at_least_one: tuple[int, ...], bits: float
) -> None:
    scores = make_scores(layers=tuple(range(4)), experts=16)
    recipe = scalar(
        bits=bits,
        cost="random",
        scope=scope,  # type: ignore[arg-type]  # a parameter
        per_projection=per_projection,
        at_least_one=at_least_one,
    )
    plan = allocate(scores, recipe)
    smallest_step = (1 if not per_projection else 1 / 2) / (64 if scope == "model" else 16)
    assert bits - smallest_step < plan.average_bits <= bits
    assert (plan.bits[..., 0] == plan.bits[..., 1]).all() != per_projection
    for row in plan.bits:
        assert set(at_least_one) <= set(row[:, 0].tolist()) & set(row[:, 1].tolist())
    assert allocate(scores, recipe).bits.tolist() == plan.bits.tolist()


def test_random_draws_every_tight_allocation_about_as_often() -> None:
    """Four items of widths 1, 2, 3 with a sum of 8: 19 allocations, by hand and by chance."""
    sizes = np.tile([1, 2, 3], (4, 1))
    possible = [w for w in itertools.product(range(3), repeat=4) if sum(w) == 4]
    rng = np.random.default_rng(0)
    empty = np.empty((0, 0), dtype=np.int64)
    drawn = Counter(tuple(draw(sizes, 8, empty, (), rng).tolist()) for _ in range(570))
    assert set(drawn) == set(possible)
    assert len(possible) == 19
    assert 30 - 5 * 5.5 < min(drawn.values()) <= max(drawn.values()) < 30 + 5 * 5.5  # 5 sigma


def test_a_random_plan_is_stepped_until_the_budget_is_met_and_no_step_fits() -> None:
    """Each item may need several steps, down as well as up."""
    sizes, free, rng = np.tile([1, 2, 3], (4, 1)), np.ones(4, dtype=bool), np.random.default_rng(0)
    smallest, largest = np.zeros(4, dtype=np.int64), np.full(4, 2)
    assert tighten(smallest, free, sizes, 12, rng).tolist() == [2, 2, 2, 2]
    assert tighten(largest, free, sizes, 4, rng).tolist() == [0, 0, 0, 0]
    for choice in (smallest, largest):
        found = tighten(choice, np.arange(4) > 0, sizes, 7, rng)
        assert found[0] == choice[0] and found.sum() == 3


def test_uniform() -> None:
    scores = make_scores()
    for bits in (1, 2, 3):
        plan = allocate(scores, scalar(cost="uniform", bits=bits))
        assert (plan.bits == bits).all()
        assert plan.average_bits == bits
        for larger in ({"size": plan.folder_bytes}, {"bpw": plan.bits_per_weight}):
            again = allocate(scores, scalar(cost="uniform", **larger))
            assert again.bits.tolist() == plan.bits.tolist()
        less = scalar(cost="uniform", size=plan.folder_bytes - 1)
        if bits == 1:
            with pytest.raises(BudgetError):
                allocate(scores, less)
        else:
            assert (allocate(scores, less).bits == bits - 1).all()
    for bits in (2.5, 8):
        with pytest.raises(BudgetError, match=r"No uniform allocation.*smallest is 1.*largest 3"):
            allocate(scores, scalar(cost="uniform", bits=bits))
    with pytest.raises(InputError, match="at_least_one"):
        allocate(scores, scalar(cost="uniform", bits=2, at_least_one=(3,)))


def test_the_frontier_falls() -> None:
    scores = make_scores(experts=8)
    plans = frontier(scores, scalar(size=10**6), [1.2, 1.7, 2.2, 2.7])
    losses = [plan.predicted_loss for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] == allocate(scores, scalar(bits=1.7)).predicted_loss


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["bits", "bpw", "size"])
@pytest.mark.parametrize("at_least_one", [(), (2, 3)])
@pytest.mark.parametrize("cost", ["error", "random"])
def test_the_range_is_what_is_possible(unit: str, at_least_one: tuple[int], cost: str) -> None:
    scores = make_scores(layers=(0, 1, 2), experts=3)  # thirds, which no float is
    recipe = scalar(at_least_one=at_least_one, cost=cost)  # type: ignore[arg-type]  # a parameter
    low, high = getattr(budget_range(scores, recipe), unit)
    smallest = allocate(scores, recipe.with_changes(**{unit: low}))
    largest = allocate(scores, recipe.with_changes(**{unit: high}))
    got = {"bits": "average_bits", "bpw": "bits_per_weight", "size": "folder_bytes"}[unit]
    assert getattr(smallest, got) == pytest.approx(low, rel=1e-12)
    assert getattr(largest, got) == pytest.approx(high, rel=1e-12)
    too_small = low - 1 if unit == "size" else low * 0.999
    with pytest.raises(BudgetError, match=f"^{unit} .*smallest is .* largest ") as error:
        allocate(scores, recipe.with_changes(**{unit: too_small}))
    assert ("at least one of [2, 3] in each layer" in str(error.value)) == bool(at_least_one)
    words = str(error.value).split()
    named = words[words.index("smallest") + 2]
    allocate(scores, recipe.with_changes(**{unit: int(named) if unit == "size" else float(named)}))


def test_the_bits_of_a_plan_are_a_budget_that_gives_it_again() -> None:
    """Most averages of these have no exact float."""
    for experts in range(3, 24):
        scores = make_scores(experts=experts, layers=(0,), other_weights=experts + 1)
        for recipe in (scalar(bits=2.45, per_projection=False), scalar(bits=1.9)):
            plan = allocate(scores, recipe)
            for unit, got in (("bits", plan.average_bits), ("bpw", plan.bits_per_weight)):
                again = recipe.with_changes(**{"bits": None, "bpw": None, unit: got})
                assert allocate(scores, again).predicted_loss <= plan.predicted_loss * (1 + 1e-12)


def test_a_budget_above_the_largest_is_lowered(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = allocate(make_scores(), scalar(bits=7))
    assert (plan.bits == 3).all()
    assert "bits 7 is above the largest possible, 3.0000" in caplog.text


@pytest.mark.parametrize("budget", [{"bits": 7}, {"bpw": 99}, {"size": 10**9}])
def test_a_budget_above_the_largest_is_told_once(
    budget: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plan = allocate(with_linears(), scalar(**budget))
    assert (plan.bits == 3).all() and set(plan.linear_bits.values()) == {8}
    assert caplog.text.count("above the largest possible") == 1
    assert "size" not in budget or "size 1000000000 is above" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        allocate(with_linears(), scalar(**budget, over="worst"))
    assert caplog.text.count("above the largest possible") == 1


def test_no_budget() -> None:
    with pytest.raises(InputError, match="No budget"):
        allocate(make_scores(), scalar())


def test_more_widths_asked_of_a_layer_than_it_has_experts() -> None:
    with pytest.raises(InputError, match="3 widths in every layer, but a layer has 2 experts"):
        allocate(make_scores(), scalar(bits=2, at_least_one=(1, 2, 3)))


def test_scores_that_do_not_fit_the_recipe_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[4, 8\], but the scores hold \[1, 2, 3\]"):
        allocate(make_scores(), scalar(bits=2, expert_bits=(2, 4, 8)))
    with pytest.raises(InputError, match="group size 64, but the scores were measured at 128"):
        allocate(make_scores(), scalar(bits=2, group_size=64))
    with pytest.raises(InputError, match="0 tokens"):
        allocate(make_scores(total_tokens=0), scalar(bits=2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("name", ["squared_error", "routing_weight", "residual_energy"])
def test_impossible_numbers_name_layer_and_expert(name: str, value: float) -> None:
    scores = make_scores()
    getattr(scores, name)[1] = value
    where = "layer 3 is" if name == "residual_energy" else "layer 3 expert 0 is"
    with pytest.raises(NumericalError, match=f"{name} of {where} {value}"):
        allocate(scores, scalar(bits=2))


def test_exponents_that_overflow() -> None:
    tokens = np.array([[0, 5], [5, 5]])
    with pytest.raises(NumericalError, match="layer 1 expert 0"):
        allocate(
            make_scores(tokens=tokens), Recipe.load("paper", bits=2, alpha=-1.0, at_least_one=())
        )


# --- the file -----------------------------------------------------------------------------------


def same(a: BitAllocation, b: BitAllocation) -> bool:
    rest = [{k: v for k, v in vars(plan).items() if k != "bits"} for plan in (a, b)]
    return (
        rest[0] == rest[1] and a.bits.tolist() == b.bits.tolist() and a.bits.dtype == b.bits.dtype
    )


@pytest.mark.parametrize("recipe", [scalar(bits=2.3), Recipe.load("paper", size=55_000)])
def test_saved_and_loaded(tmp_path: Path, recipe: Recipe) -> None:
    plan = allocate(make_scores(experts=3), recipe)
    plan.save(tmp_path / "plan.json")
    again = BitAllocation.load(tmp_path / "plan.json")
    assert same(again, plan)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "plan.json"]


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    plan = allocate(make_scores(experts=3), scalar(bits=2.3))
    plan.save(tmp_path / "plan.json")
    fields = json.loads((tmp_path / "plan.json").read_text())
    assert fields["kind"] == "plan"
    assert [row["layer"] for row in fields["layers"]] == [1, 3]
    for row, bits in zip(fields["layers"], plan.bits, strict=True):
        assert row["gate_up"] == "".join(map(str, bits[:, 0].astype(int)))
        assert row["down"] == "".join(map(str, bits[:, 1].astype(int)))


def test_files_that_are_no_plan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(CheckpointError, match=r"plan\.json"):
        BitAllocation.load(path)
    for text in ('{"kind": "calibration"}', "[1, 2]", "3"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"is not a plan\. Expected a file made by"):
            BitAllocation.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"gate_up"', '"gate"'),
        lambda text: text.replace('"down": "', '"down": "1'),
        lambda text: text.replace('"down": "', '"down": "x'),
        lambda text: text.replace('"down": "1', '"down": "7').replace('"down": "2', '"down": "7'),
        lambda text: text.replace('"layer": 3', '"layer": 1'),
        lambda text: text.replace('"group_size": 128', '"group_size": 100'),
        lambda text: text.replace('"predicted_loss": ', '"predicted_loss": NaN, "x": '),
        lambda text: text.replace('"predicted_loss": ', '"predicted_loss": -'),
        lambda text: text.replace('"total_bytes": ', '"total_bytes": -'),
        lambda text: text.replace('"total_bytes": ', '"total_bytes": null, "x": '),
        lambda text: text.replace('"provenance": {', '"provenance": [], "x": {'),
        lambda text: text.replace('"average_bits": ', '"average_bits": 9'),
        lambda text: text.replace('"alpha"', '"omega"'),
        lambda text: text.replace('"layers": [', '"layers": 5, "x": ['),
        lambda text: text.replace('"layers": [', '"layers": [], "x": ['),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "plan.json"
    allocate(make_scores(), scalar(bits=2.3)).save(path)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(CheckpointError, match=r"plan\.json"):
        BitAllocation.load(path)


def test_a_plan_checks_itself_and_cannot_be_changed() -> None:
    plan = allocate(make_scores(), scalar(bits=2))
    with pytest.raises(ValueError, match="read-only"):
        plan.bits[0, 0, 0] = 1
    with pytest.raises(CheckpointError, match=r"widths \[8\], expected some of \(1, 2, 3\)"):
        dataclasses.replace(plan, bits=np.full_like(plan.bits, 8))
    with pytest.raises(CheckpointError, match=r"expected \[L, E, 2\] with L = 2 layers"):
        dataclasses.replace(plan, bits=plan.bits[:1])


def test_the_package_exports_allocate() -> None:
    assert allocate_from_package is allocate


# --- open linears, and several texts --------------------------------------------


def with_linears(seed: int = 0, sources: int = 1, **changes: Any) -> ExpertScores:
    """Scores of 40 experts and 3 open linears of 2, 4 or 8 bits, on one or more texts."""
    rng = np.random.default_rng(seed)
    plain = make_scores(seed, experts=20)
    share = rng.dirichlet(np.full(sources, 0.4), plain.tokens.shape)  # experts have their texts
    share *= np.arange(1, sources + 1) / sources  # and some texts lose more
    mix = share.transpose(2, 0, 1)[..., None, None]
    cost = rng.lognormal(-1, 1, (3, 1)) * 4.0 ** -np.array([2, 4, 8])
    linear_mix = rng.dirichlet(np.ones(sources), (3, 3)).transpose(2, 0, 1)
    fields = {
        "cost": plain.cost * mix,
        "text_tokens": (1000 // sources,) * sources,
        "linears": ("a.weight", "b.weight", "c.weight"),
        "linear_bits": (2, 4, 8),
        "linear_bytes": np.array([[512, 1024, 2048], [64, 128, 256], [2048, 4096, 8192]]),
        "linear_cost": cost * linear_mix,
    }
    return make_scores(seed, experts=20, **fields | changes)


@pytest.mark.parametrize(
    ("seed", "share", "larger"),
    [(0, 0.2, 1), (1, 0.5, 1), (2, 0.8, 1), (1, 0.6, 8), (0, 0.7, 32), (1, 0.6, 32)],
)
def test_linears_and_experts_share_bytes_as_well_as_can_be(
    seed: int, share: float, larger: int
) -> None:
    """The oracle: every choice of the linears, and the experts' exact program for each.

    An embedding may have a good part of all bytes, as the last linear has here: where its next
    width does not fit, all others share the bytes that are left.
    """
    scores = with_linears(seed)
    scores.linear_bytes[-1] *= larger
    low, high = budget_range(scores, scalar()).size
    size = round(low + share * (high - low))
    plan = allocate(scores, scalar(size=size))
    assert plan.folder_bytes <= size
    losses = []
    for columns in itertools.product(range(3), repeat=3):
        taken = int(scores.linear_bytes[range(3), columns].sum())
        without = dataclasses.replace(
            scores, linears=(), linear_bytes=np.zeros((0, 3), np.int64),
            linear_cost=np.zeros((1, 0, 3)), fixed_bytes=scores.fixed_bytes + taken,
        )  # fmt: skip
        try:
            experts = allocate(without, scalar(size=size))
        except BudgetError:
            continue
        losses.append(experts.predicted_loss + scores.linear_cost[0][range(3), columns].sum())
    assert plan.predicted_loss <= min(losses) * 1.01  # one expert is a hundredth of the loss


def test_under_a_budget_of_bits_a_byte_of_a_linear_costs_what_8_bits_of_experts_do() -> None:
    """One linear would gain twice what its bytes are worth in experts, the other half of it."""
    scores = with_linears()
    bits = allocate(scores, scalar(bits=2.0)).bits  # does not depend on the linears
    sizes = np.array([96 * 128, 128 * 96])
    column = np.searchsorted(scores.bits, bits)[..., None]
    costs = scores.cost[0, :, :, :2]
    gain = np.take_along_axis(costs, column, -1) - np.take_along_axis(
        costs, np.minimum(column + 1, 2), -1
    )
    price = (gain[..., 0] / sizes).max()  # of a bit: the best step up that there is no room for
    worth = 8 * price * np.array([512, 64])
    linear_cost = np.array([[2 * worth[0], 0, 0], [worth[1] / 2, 0, 0], [0, 0, 0]])
    plan = allocate(dataclasses.replace(scores, linear_cost=linear_cost[None]), scalar(bits=2.0))
    assert plan.bits.tolist() == bits.tolist()
    assert tuple(plan.linear_bits.values()) == (4, 2, 2)


def test_linears_grow_with_the_budget_and_count_as_stored() -> None:
    scores = with_linears()
    sizes = []
    for bits in (1.2, 1.6, 2.0, 2.4, 2.9):
        plan = allocate(scores, scalar(bits=bits))
        columns = [scores.linear_bits.index(b) for b in plan.linear_bits.values()]
        stored = int(scores.linear_bytes[range(3), columns].sum())
        assert plan.total_bytes == scores.fixed_bytes + stored + plan.expert_bytes
        assert plan.average_bits == pytest.approx(bits, abs=0.02)  # counts the experts alone
        sizes.append(stored)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("cost", ["paper", "uniform", "random"])
def test_linears_are_of_the_usual_width_where_the_cost_does_not_cover_them(cost: str) -> None:
    scores = with_linears()
    for budget in ({"bits": 2.0}, {"size": budget_range(scores, scalar(cost=cost)).size[1]}):
        plan = allocate(scores, scalar(cost=cost, **budget))
        assert set(plan.linear_bits.values()) == {4}


def test_budgets_out_of_range_with_linears() -> None:
    scores = with_linears()
    low, high = budget_range(scores, scalar()).size
    for over in ("mean", "worst"):
        assert allocate(scores, scalar(size=low, over=over)).folder_bytes == low
        assert allocate(scores, scalar(size=high, over=over)).folder_bytes == high
    with pytest.raises(BudgetError, match=f"the smallest is {low}"):
        allocate(scores, scalar(size=low - 1))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
def test_linears_leave_room_for_the_widths_that_every_layer_must_use(share: float) -> None:
    """The price of a byte does not know of `at_least_one`, under which experts take more bytes.

    Linears that are dear to shrink would take these bytes too, and no choice of experts would fit.
    """
    scores = with_linears()
    scores = dataclasses.replace(scores, linear_cost=scores.linear_cost * 1e6)
    recipe = scalar(at_least_one=(2, 3))
    low, high = budget_range(scores, recipe).size
    size = round(low + share * (high - low))
    plan = allocate(scores, recipe.with_changes(size=size))
    assert plan.folder_bytes <= size
    for row, part in itertools.product(range(2), range(2)):
        assert {2, 3} <= set(plan.bits[row, :, part].tolist())


@pytest.mark.parametrize("budget", [{"bits": 2.0}, {"size": 270_000}])
def test_over_the_worst_text(budget: dict[str, Any]) -> None:
    scores = with_linears(sources=3)

    def losses(over: str) -> Floats:
        plan = allocate(scores, scalar(over=over, **budget))
        columns = np.searchsorted(scores.bits, plan.bits)
        linears = [scores.linear_bits.index(b) for b in plan.linear_bits.values()]
        experts = np.take_along_axis(scores.cost[:, :, :, :2], columns[None, ..., None], axis=-1)
        of_linears = scores.linear_cost[:, range(3), linears].sum(axis=1)
        return np.asarray(experts.sum(axis=(1, 2, 3, 4)) + of_linears) * 3

    mean, worst = losses("mean"), losses("worst")
    assert worst.max() < mean.max() and worst.mean() >= mean.mean() * (1 - 1e-9)


def test_over_the_worst_text_in_bytes_where_only_experts_have_open_widths() -> None:
    """As with `fast`: without open tensors, bytes of the folder are bytes of the experts."""
    scores = with_linears(
        sources=3, linears=(), linear_bits=(), linear_bytes=np.zeros((0, 0), np.int64),
        linear_cost=np.zeros((3, 0, 0)),
    )  # fmt: skip
    plan = allocate(scores, scalar(bits=2.0, over="worst"))
    again = allocate(scores, scalar(size=plan.folder_bytes, over="worst"))
    assert again.folder_bytes <= plan.folder_bytes
    assert again.average_bits == pytest.approx(plan.average_bits, abs=0.05)


@pytest.mark.parametrize("budget", [{"bits": 2.0}, {"size": 270_000}])
def test_the_worst_text_is_that_of_the_largest_loss_per_token(budget: dict[str, Any]) -> None:
    """How many tokens a text has makes no difference. Shares are powers of two, so all is exact."""
    alike, other = (256, 256, 512), (512, 256, 256)
    scores = with_linears(sources=3, total_tokens=1024, text_tokens=alike)
    ratio = np.array(other) / np.array(alike)
    moved = dataclasses.replace(
        scores,
        text_tokens=other,
        cost=scores.cost * ratio[:, None, None, None, None],
        linear_cost=scores.linear_cost * ratio[:, None, None],
    )
    recipe = scalar(over="worst", **budget)
    plan, again = allocate(scores, recipe), allocate(moved, recipe)
    assert (plan.bits.tolist(), plan.linear_bits) == (again.bits.tolist(), again.linear_bits)


def test_linears_survive_the_file(tmp_path: Path) -> None:
    plan = allocate(with_linears(), scalar(bits=2.0))
    plan.save(tmp_path / "plan.json")
    assert BitAllocation.load(tmp_path / "plan.json").linear_bits == plan.linear_bits
    other = dataclasses.replace(plan, linear_bits=dict.fromkeys(plan.linear_bits, 2))
    assert other.digest() != plan.digest()
    with pytest.raises(CheckpointError, match="linears of"):
        dataclasses.replace(plan, linear_bits={"a.weight": 5})


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("attention_bits", None),
        ("head_bits", 8),
        ("linear_codec", "trellis"),
        ("linear_bits", (4,)),
    ],
)
def test_the_recipe_must_leave_open_what_the_scores_measured(field: str, asked: object) -> None:
    scores = dataclasses.replace(with_linears(), recipe=scalar().to_dict())
    with pytest.raises(InputError, match=f"{field} .*measured with"):
        allocate(scores, scalar(bits=2.0, **{field: asked}))


@pytest.mark.parametrize(
    ("row", "value"), [((0, 1, 0), np.nan), ((0, 1, 2), -1.0), ((0, 1), np.inf)]
)
def test_costs_of_linears_must_be_numbers_of_at_least_0(row: tuple[int, ...], value: float) -> None:
    costs = with_linears().linear_cost.copy()
    costs[row] = value
    with pytest.raises(NumericalError, match=r"of b\.weight are"):
        allocate(dataclasses.replace(with_linears(), linear_cost=costs), scalar(bits=2.0))


def test_a_width_that_is_not_offered_is_never_taken() -> None:
    costs = with_linears().linear_cost.copy()
    costs[0, :, 0] = np.inf  # 2 bits
    scores = dataclasses.replace(with_linears(), linear_cost=costs)
    for budget in ({"bits": 1.01}, {"size": budget_range(scores, scalar()).size[0]}):
        assert min(allocate(scores, scalar(**budget)).linear_bits.values()) == 4
