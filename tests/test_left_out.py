"""Experts of 0 bits: they take no bytes, no budget, and add nothing to the output."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moepress import kernels
from moepress.allocate import allocate, warn_of_left_out
from moepress.allocation.budget import budget_range
from moepress.allocation.choices import Choices
from moepress.allocation.plan import BitAllocation
from moepress.cli import app
from moepress.compress import compress
from moepress.costs.drop_costs import DropMeter
from moepress.costs.scores import ROUNDED, ExpertScores
from moepress.errors import BudgetError, CheckpointError, InputError
from moepress.format.checkpoint import PLAN, load_json
from moepress.format.codec import Codec, PackedSpec
from moepress.format.quantization import packed_specs
from moepress.kernels import cpu
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts
from moepress.kernels.reference import dequantize
from moepress.original.experts import Routed, RoutedExpert
from moepress.original.source import Source
from moepress.page.sections import SECTIONS
from moepress.page.subject import Subject
from moepress.propose import proposal
from moepress.prune import Pruning, prune
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.report import expert_values, report
from moepress.score import score
from moepress.work import calibration_ids
from tests.conftest import small_recipe
from tests.kernels.test_kernels import random_packed
from tests.test_allocate import make_scores, scalar

Folder = Callable[..., Path]
WIDTHS = (0, 1, 2, 3)
BACKENDS = ["reference"] if cpu.missing() else ["reference", *cpu.instruction_sets()]


# Kernels


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        with kernels.only("reference"):
            yield request.param
        return
    cpu.use(request.param)
    yield request.param
    cpu.use(cpu.instruction_sets()[0])


def packed_experts(family: str, bits: tuple[int, ...], hidden: int = 64, inner: int = 96) -> Any:
    spec = PackedSpec(bits, 32, family)
    module = PackedExperts(len(bits), hidden, inner, spec, spec, Gate("silu"))
    for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        parts = [
            random_packed(*shape, Codec(b, 32), seed)
            if family == "int"
            else random_trellis(*shape, b, seed)
            for seed, b in enumerate(bits)
            if b
        ]
        getattr(module, name).data = torch.cat([torch.empty(0, dtype=torch.uint8), *parts])
    return module


def random_trellis(rows: int, cols: int, bits: int, seed: int) -> Tensor:
    from tests.rounding.test_trellis import random_packed as of_codec

    return of_codec(rows, cols, Codec(bits, 32, "trellis"), seed)


@pytest.mark.parametrize("family", ["int", "trellis"])
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_choosing_an_expert_that_is_left_out_adds_nothing(
    backend: str, family: str, tokens: int
) -> None:
    """The same to the last bit as a token that chose no expert there."""
    torch.manual_seed(0)
    module = packed_experts(family, (2, 0, 3, 0, 1))
    x, weights = torch.randn(tokens, 64), torch.rand(tokens, 3)
    index = torch.rand(tokens, 5).topk(3).indices
    index[0] = torch.tensor([1, 3, 1])
    elsewhere = index.where((index != 1) & (index != 3), 5)
    y = module(x, index, weights)
    assert torch.equal(y, module(x, elsewhere, weights))
    assert y[0].eq(0).all()
    assert tokens == 1 or y[1:].ne(0).any()


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_a_layer_may_lose_all_its_experts(backend: str, family: str) -> None:
    module = packed_experts(family, (0, 0))
    y = module(torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert y.eq(0).all() and module.gate_up_proj.numel() == 0


def test_an_expert_is_left_out_whole() -> None:
    spec, other = PackedSpec((2, 0), 32), PackedSpec((2, 2), 32)
    with pytest.raises(InputError, match="Expert 1 has 0 and 2 bits"):
        PackedExperts(2, 64, 96, spec, other, Gate("silu"))
    assert "left out" in repr(PackedExperts(2, 64, 96, spec, spec, Gate("silu")))


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_kernels_refuse_half_an_expert(backend: str, family: str) -> None:
    module = packed_experts(family, (2, 2))
    gate_up_table, down_table = (table.clone() for table in module._tables)
    down_table[1, 1] = 0
    module._tables_here = gate_up_table, down_table
    with pytest.raises(InputError, match=r"no codec has those code bits|0-bit codes do not exist"):
        module(torch.randn(3, 64), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1))


# Scores


def test_leaving_an_expert_out_costs_its_output(model_folder: Folder, text_file: Path) -> None:
    """The oracle: the whole block by transformers, with the expert's weights zero."""
    folder = model_folder("mixtral")
    recipe = small_recipe(text_file, measure="rtn", expert_bits=(0, 2))
    source = Source(folder)
    scores = score(source, recipe)
    layer = max(source.experts)
    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = model.get_submodule(source.experts[layer].path)
    calls: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.inference_mode():
        model(calibration_ids(source, recipe))
    handle.remove()
    row = scores.layers.index(layer)
    with torch.inference_mode():
        exact = experts(*calls[0]).double()
        for expert in range(4):
            kept = experts.down_proj[expert].clone()
            experts.down_proj[expert] = 0
            expected = (experts(*calls[0]).double() - exact).square().sum().item()
            experts.down_proj[expert] = kept
            for part in range(len(ROUNDED)):
                assert scores.squared_error[row, expert, part, 0] == pytest.approx(expected, 1e-4)
    assert scores.bits == (0, 2)


# Allocation, against every plan there is


def every_plan(recipe: Recipe, experts: int) -> list[np.ndarray[Any, Any]]:
    one = [
        (a, b)
        for a, b in itertools.product(recipe.expert_bits, repeat=2)
        if (a == 0) == (b == 0) and (recipe.per_projection or a == b)
    ]
    return [np.array(plan) for plan in itertools.product(one, repeat=experts)]


def loss_and_sizes(
    scores: ExpertScores, recipe: Recipe, plan: np.ndarray[Any, Any]
) -> tuple[float, int, int]:
    """Loss, code bits and bytes of a plan [E, 2] of a single layer."""
    loss, code, stored = 0.0, 0, 0
    for expert, pair in enumerate(plan.tolist()):
        cost = scores.cost[0, 0, expert]
        if pair == [0, 0]:
            loss += cost[2, 0]
            continue
        (a, b) = (scores.bits.index(bits) for bits in pair)
        together = [cost[2, c] / (cost[0, c] + cost[1, c]) for c in (a, b)]
        summed = cost[0, a] + cost[1, b]
        loss += summed * np.sqrt(together[0] * together[1]) if recipe.per_projection else cost[2, a]
        for bits, (rows, cols), group in zip(
            pair, (scores.gate_up_shape, scores.down_shape), (128, 32), strict=True
        ):
            code += bits * rows * cols
            stored += Codec(bits, group).nbytes(rows, cols)
    return loss, code, stored


@pytest.mark.parametrize("budget", [{"bits": 0.6}, {"bits": 1.3}, {"bpw": 2.2}, {"size": 15_000}])
@pytest.mark.parametrize("per_projection", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_least_loss_of_all_plans(budget: dict[str, Any], per_projection: bool, seed: int) -> None:
    scores = make_scores(seed, layers=(4,), experts=3, bits=WIDTHS)
    recipe = scalar(**budget, expert_bits=WIDTHS, per_projection=per_projection)
    weights = 3 * (96 * 128 + 128 * 96)
    most = {
        "bits": lambda code, _: code <= budget.get("bits", 0) * weights,
        "bpw": lambda _, stored: (stored + 5000) * 8 <= budget.get("bpw", 0) * (weights + 3000),
        "size": lambda _, stored: stored + 5700 <= budget.get("size", 0),
    }[next(iter(budget))]
    found = [
        (loss, plan)
        for plan in every_plan(recipe, 3)
        for loss, code, stored in [loss_and_sizes(scores, recipe, plan)]
        if most(code, stored)
    ]
    plan = allocate(scores, recipe)
    loss, code, stored = loss_and_sizes(scores, recipe, plan.bits[0])
    assert plan.predicted_loss == pytest.approx(min(loss for loss, _ in found), rel=1e-12)
    assert plan.predicted_loss == pytest.approx(loss, rel=1e-12)
    assert (plan.expert_bytes, plan.average_bits) == (stored, pytest.approx(code / weights))
    assert most(code, stored)


def test_an_expert_that_costs_nothing_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = make_scores(3, experts=4, bits=WIDTHS)
    scores.cost[:, 1, 2, :, 0] = 0
    plan = allocate(scores, scalar(bits=2.0, expert_bits=WIDTHS))
    with caplog.at_level(logging.WARNING):
        warn_of_left_out(scores, plan)
    assert plan.bits[1, 2].tolist() == [0, 0]
    assert "are left out; 0 of them no scored token chose" in caplog.text


@pytest.mark.parametrize("cost", ["error", "paper"])
@pytest.mark.parametrize("over", ["mean", "worst"])
def test_an_expert_that_no_token_chose_is_not_the_first_to_go(cost: str, over: str) -> None:
    """Its costs are all 0. It is left out with the cheapest expert of its layer, or later."""
    scores = make_scores(3, experts=6, bits=WIDTHS)
    for name in ("cost", "squared_error"):
        getattr(scores, name)[..., 1, 2, :, :] = 0
    scores.tokens[1, 2] = 0
    gone = 0
    for bits in np.linspace(0.3, 3, 28):
        recipe = scalar(bits=float(bits), expert_bits=WIDTHS, cost=cost, over=over)
        left_out = allocate(scores, recipe).bits[1, :, 0] == 0
        gone += int(left_out[2])
        assert not left_out[2] or left_out.sum() > 1
    assert gone


@pytest.mark.parametrize("over", ["mean", "worst"])
def test_an_expert_that_no_token_of_several_texts_chose_is_not_the_first_to_go(over: str) -> None:
    """Each text has experts of its own, which cost nothing on the other text."""
    scores = make_scores(3, experts=6, bits=WIDTHS)
    cost = np.concatenate([scores.cost, scores.cost]) / 2
    cost[0, :, :3] = cost[1, :, 3:] = 0
    cost[:, 1, 2] = 0
    scores = dataclasses.replace(
        scores, cost=cost, text_tokens=(500, 500), linear_cost=np.zeros((2, 0, 0))
    )
    scores.tokens[1, 2] = 0
    gone = 0
    for bits in np.linspace(0.3, 3, 28):
        recipe = scalar(
            bits=float(bits), expert_bits=WIDTHS, over=over, calib=(("a", 1.0), ("b", 1.0))
        )
        left_out = allocate(scores, recipe).bits[1, :, 0] == 0
        gone += int(left_out[2])
        assert not left_out[2] or left_out.sum() > 1
    assert gone


@pytest.mark.parametrize("per_projection", [True, False])
def test_columns_and_bits_undo_each_other(per_projection: bool) -> None:
    scores = make_scores(bits=WIDTHS)
    recipe = scalar(bits=2.0, expert_bits=WIDTHS, per_projection=per_projection)
    choices = Choices.of(scores, recipe)
    choice = np.random.default_rng(0).integers(0, choices.nbytes.shape[1], choices.shape)
    bits = choices.bits(choice)
    assert bits.shape == (2, 2, 2) and ((bits[..., 0] == 0) == (bits[..., 1] == 0)).all()
    assert (choices.options(bits.astype(np.int8)) == choice).all()
    assert choices.nbytes.argmin() == 0 and choices.nbytes.argmax() == choices.nbytes.size - 1


@pytest.mark.parametrize("cost", ["random", "uniform", "paper"])
def test_every_objective_may_leave_experts_out(cost: str) -> None:
    scores = make_scores(5, experts=6, bits=WIDTHS)
    plan = allocate(scores, scalar(bpw=1.9, expert_bits=WIDTHS, cost=cost))
    assert ((plan.bits[..., 0] == 0) == (plan.bits[..., 1] == 0)).all()
    assert 0 < plan.average_bits < 3
    assert (plan.bits == 0).any() == (cost != "uniform")
    assert len(proposal(scores, plan.recipe, {}).plans) >= 3
    subject = Subject("tiny", plan, scores)
    assert subject.paid.shape == (2, 6)
    columns = dict(expert_values(subject)["columns"])
    assert ("cost at 0 bits" in columns) == (cost != "uniform")
    for _, _, make in SECTIONS[:4]:
        make(subject)


@pytest.mark.parametrize("widths", [WIDTHS, (1, 2, 3)])
@pytest.mark.parametrize("per_projection", [True, False])
def test_costs_in_the_report_are_those_of_plans_of_that_width(
    widths: tuple[int, ...], per_projection: bool
) -> None:
    scores = make_scores(7, experts=4, bits=WIDTHS)
    recipe = scalar(bits=1.5, expert_bits=widths, per_projection=per_projection)
    plan = allocate(scores, recipe)
    told = dict(expert_values(Subject("tiny", plan, scores))["columns"])
    for bits in widths:
        alike = dataclasses.replace(plan, bits=np.full_like(plan.bits, bits))
        paid = Subject("tiny", alike, scores).paid
        np.testing.assert_allclose(told[f"cost at {bits} bits"], paid.ravel(), rtol=6e-3)
        if not per_projection or widths == WIDTHS:  # what was measured of the whole expert
            expected = scores.cost[0, :, :, 2, scores.bits.index(bits)]
            np.testing.assert_allclose(paid, expected)


@pytest.mark.parametrize("layers", [(4,), (1, 3)])  # room for just one expert, and for two
def test_one_expert_is_kept_even_if_leaving_all_out_costs_less(layers: tuple[int, ...]) -> None:
    """One bit costs twice what leaving an expert out does, in the smallest budget possible."""
    scores = make_scores(8, layers=layers, experts=4, bits=WIDTHS)
    scores.cost[..., 0] = 0.5 * scores.cost[..., 1]
    for scope in ("model", "layer"):
        recipe = scalar(expert_bits=WIDTHS, scope=scope)
        low = budget_range(scores, recipe).bits[0]
        plan = allocate(scores, recipe, bits=low)
        assert (plan.bits[..., 0] > 0).sum() == 1
        assert plan.average_bits <= low


def test_every_possible_budget_keeps_experts() -> None:
    scores = make_scores(6, experts=4, bits=WIDTHS)
    for scope in ("model", "layer"):
        recipe = scalar(expert_bits=WIDTHS, scope=scope)
        low, high = budget_range(scores, recipe).bits
        assert 0 < low < 0.3 and high == 3
        assert allocate(scores, recipe, bits=low).bits.any()
        with pytest.raises(BudgetError, match="the smallest is"):
            allocate(scores, recipe, bits=0.9 * low)
        assert len(proposal(scores, recipe, {}).plans) > 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expert_bits": (0,)}, "leaves every expert out"),
        ({"expert_bits": (0, 2), "at_least_one": (2,)}, "experts are allocated whole"),
        ({"linear_bits": (0, 4)}, "linear_bits is 0"),
        ({"attention_bits": 0}, "attention_bits is 0"),
    ],
)
def test_contradictory_recipes_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe(**changes)


def test_a_plan_of_half_an_expert_is_refused(tmp_path: Path) -> None:
    scores = make_scores(bits=WIDTHS)
    allocate(scores, scalar(bits=1.0, expert_bits=WIDTHS)).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    row = load_json(tmp_path / "plan.json")["layers"][0]
    (tmp_path / "plan.json").write_text(
        text.replace(f'"gate_up": "{row["gate_up"]}"', '"gate_up": "00"', 1)
        if row["down"] != "00"
        else text.replace('"down": "00"', '"down": "12"', 1)
    )
    with pytest.raises(CheckpointError, match="one projection left out"):
        BitAllocation.load(tmp_path / "plan.json")


def test_allocate_may_be_told_to_leave_none_out(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    scores = score(Source(model_folder()), small_recipe(text_file, expert_bits=WIDTHS))
    file, plan = tmp_path / "scores.safetensors", tmp_path / "plan.json"
    scores.save(file)
    command = ["allocate", str(file), str(plan), "--bits", "1.2"]
    for widths in (WIDTHS, (1, 2, 3)):
        asked = [] if widths == WIDTHS else ["--expert-bits", "3,1,2"]
        result = CliRunner().invoke(app, [*command, *asked])
        assert result.exit_code == 0, result.output
        assert BitAllocation.load(plan).recipe.expert_bits == widths


def test_drop_costs_ignore_experts_that_are_left_out(model_folder: Folder) -> None:
    """The same as if the router had chosen no expert there, whether it normalises or not."""
    source = Source(model_folder())
    torch.manual_seed(0)
    index = torch.rand(200, 4).topk(2).indices
    weight = torch.rand(200, 2)
    weight /= weight.sum(1, keepdim=True)
    hidden = torch.randn(200, source.hidden)
    module = source.model.get_submodule(source.experts[0].path)
    found = []
    for places, left_out in ((index, (1, 3)), (index.where((index == 0) | (index == 2), 4), ())):
        routed = Routed(hidden, places, weight)
        meter = DropMeter(routed, 4, 0, left_out)
        for expert in (0, 2):
            meter.add(RoutedExpert(0, expert, module, source.expert(0, expert), routed))
        found.append(meter.result(1.0))
    for name in ("ratio", "cost", "renormalised_cost"):
        assert torch.equal(found[0][name], found[1][name]), name
    assert found[0]["normalised"] and found[0]["ratio"].isfinite().all()


# The whole way


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize(
    ("family", "name"), [("mixtral", "default"), ("qwen2_moe", "fast"), ("deepseek_v3", "fast")]
)
def test_a_folder_with_experts_left_out_runs_as_without_them(
    model_folder: Folder, text_file: Path, tmp_path: Path, family: str, name: str
) -> None:
    """The oracle: the original model with rounded weights, and zeros for experts left out."""
    recipe = small_recipe(text_file, name, bits=1.0, expert_bits=(0, 2, 3), correction=0.0)
    out = compress(model_folder(family), tmp_path / "out", recipe)
    plan = BitAllocation.load(out / PLAN)
    assert (plan.bits == 0).any() and (plan.bits > 0).any()
    version = load_json(out / "config.json")["quantization_config"]["format_version"]
    assert version == {"default": 4, "fast": 3}[name]
    source, specs = Source(model_folder(family)), packed_specs(out)
    packed = AutoModelForCausalLM.from_pretrained(out)
    original = AutoModelForCausalLM.from_pretrained(model_folder(family))
    with torch.no_grad():
        for path, spec in specs.items():
            blob, target = packed.get_parameter(path), original.get_parameter(path)
            shape = target.shape[-2:]
            starts = spec.offsets(*shape)
            assert len(blob) == starts[-1]
            for index, matrix in enumerate(target.view(-1, *shape)):
                if spec.bits[index] == 0:
                    matrix.zero_()
                    continue
                codec = Codec(spec.bits[index], spec.group_size, spec.family)
                matrix.copy_(dequantize(blob[starts[index] : starts[index + 1]], *shape, codec))
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)
    assert sum(len(spec.bits) > 1 for spec in specs.values()) == 2 * len(source.experts)
    page = report(out, tmp_path / "page.html").read_text()
    assert "experts are left out: a token that chooses one gets nothing from it" in page


def test_a_layer_without_any_expert_loads_and_runs(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    """Its two tensors are empty. Pruning does not count choices of experts that are left out."""
    recipe = small_recipe(text_file, bits=1.0, expert_bits=(0, 2))
    source = Source(model_folder())
    scores = score(source, recipe)
    plan = allocate(scores, recipe)
    bits = np.array([[[0, 0]] * 4, [[2, 2], [0, 0], [2, 2], [0, 0]]], dtype=np.int8)
    out = quantize(source, dataclasses.replace(plan, bits=bits), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.model.layers[0].mlp.experts.gate_up_proj.numel() == 0
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        plain = model(ids).logits
        with prune(model, 0.2, protect=0.0, count=True) as pruned:
            model(ids)
            statistics = pruned.statistics()
        alone = Pruning({1: (0.0, 1.0)}, False, 0.0)  # all but the first of what is there
        with prune(model, alone, count=True) as pruned:
            model(ids)
            dropped = pruned.statistics().dropped[1]
    assert plain.isfinite().all()
    assert statistics.dropped[0] == (0, 0)  # the layer that has none
    chosen: list[Tensor] = []
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _, args: chosen.append(args[1])
    )
    with torch.inference_mode():
        model(ids)
    hook.remove()
    both = torch.isin(chosen[0], torch.tensor([0, 2])).all(1).sum()
    assert dropped == (0, int(both))
