"""Operations of whole stages, against hand counts and against the products that PyTorch runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moepress.allocate import allocate
from moepress.costs import sketch
from moepress.estimate import assumed_plan, task_of, widths_of, work_of
from moepress.quantize import quantize_tensors
from moepress.recipe import Recipe
from moepress.request import Request
from moepress.score import score, score_tensors
from moepress.work import calibration_ids
from moepress.workload import memory, stages
from moepress.workload.operations import Work
from moepress.workload.shapes import Layer, Linear, ModelShape
from moepress.workload.task import Task
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.workload.flops import FlopCount

Folder = Callable[..., Path]


def task(layers: int = 2, **changes: object) -> Task:
    """A model of few weights, with one linear in a layer, all of whose widths are fixed."""
    linear = Linear("layers.0.mixer.proj.weight", 8, 8)
    shape = ModelShape(
        layers=(Layer(100, (linear,), True),) * layers,
        hidden=32, intermediate=64, experts=4, experts_per_token=2, vocabulary=50,
        heads=2, head=4, outside=800, itemsize=2, expert_disk=2, other_disk=2,
        compute_itemsize=4,
    )  # fmt: skip
    recipe = Recipe.load("fast", token_floor=0, **changes)
    between = (32 * shape.compute_itemsize,) * (layers + 1)
    return Task(shape, recipe, 5, 20, open={}, tables={}, head=(), between=between)


def test_a_layer_by_hand() -> None:
    """100 tokens: a product with 100 weights, and attention to 20 tokens in 2 heads."""
    work = stages.layer_forward(task(), task().shape.layers[0])
    assert work["product"] == 2 * 100 * 100
    assert work["attend"] == 100 * 20 * 2


def test_experts_by_hand() -> None:
    """100 tokens choose 2 of 4 experts, each of 3 x 32 x 64 weights."""
    assert stages.experts_forward(task(), 100)["product"] == 4 * 2 * 50 * 3 * 32 * 64


def test_sampling_by_hand() -> None:
    """5 texts of 20 tokens: in each of 20 steps 5 tokens, 3 of them at an expert."""
    work = stages.sampling(task())
    assert work["multiply 5"] == 20 * (2 * 100 + 32 * 50)  # the layers and the head
    assert work["multiply 3"] == 20 * 2 * 4 * 6144
    assert work["recall"] == 2 * 2 * 5 * 20**2 / 2  # 2 layers, 2 heads: half of all pairs
    assert work["logits"] == 20 * 5 * 50
    assert work["load"] == 800 + 2 * (100 + 4 * 6144)
    # One text, whose tokens choose 2 of the 4 experts; and two batches.
    assert stages.sampling(replace(task(), sequences=1))["multiply 1"] == 20 * (1800 + 2 * 2 * 6144)
    many = stages.sampling(replace(task(), sequences=65))
    assert many["multiply 64"] == 2 * work["multiply 5"]


def test_a_state_is_passed_over_in_place_of_keys_and_values() -> None:
    one = task()
    with_state = replace(one.shape.layers[0], state=1000)
    mixed = replace(one, shape=replace(one.shape, layers=(with_state, one.shape.layers[1])))
    work, plain = stages.sampling(mixed), stages.sampling(one)
    assert work["state"] == 20 * 5 * 1000  # 20 steps of 5 texts
    assert work["recall"] == plain["recall"] / 2 and "state" not in plain
    freed = 5 * (20 + 64) * one.shape.cached * 4  # a layer's keys and values, with their room
    assert memory.sampling(mixed) - memory.sampling(one) == 4 * 5 * 11 * 1000 - freed


def test_memory_of_written_text_by_hand() -> None:
    """Keys and values of heads that queries share, one layer of all; predictions and noise."""
    shared = replace(task().shape, key_heads=1, value_head=2)
    assert shared.cached == 4 + 2 and task().shape.cached == 2 * (4 + 4)
    expected = 4 * shared.weights + 2 * 800 + 4 * 5 * (20 + 64) * (2 * 6 + 2 * 8)
    expected += 4 * (8 * 5 * 50 + 2 * ((1 << 22) + 50))
    assert memory.sampling(replace(task(), shape=shared)) == expected


def test_sensitivity_by_hand() -> None:
    work = stages.sensitivity(task())
    layer, experts = 2 * 100 * 100, 4 * 2 * 50 * 6144
    head = 2 * 2 * 100 * 32 * 50  # forward and back
    assert work["product"] == 2 * (6 * layer + 4 * experts) + head
    assert work["logits"] == 100 * 50
    # Outside twice; for each layer its tensors twice and its experts three times.
    loaded = 2 * 800 + 2 * (2 * 100 + 3 * 4 * 6144)
    assert work["load"] == loaded
    assert work["read"] == 2 * loaded + 2 * 4 * (100 * 32 * 4)  # and states, 4 bytes an element


def test_score_by_hand() -> None:
    """Round to nearest: no Hessian, nothing but the experts at each width."""
    work = stages.score(task(measure="rtn", expert_bits=(1, 2), balance=False))
    layer, gate_up, down = 2 * 100 * 100, 2 * 50 * 32 * 128, 2 * 50 * 32 * 64
    expert = gate_up + down + 2 * (gate_up + 3 * down)
    assert work["product"] == 2 * (2 * layer + 4 * expert)
    assert work["nearest 1"] == work["nearest 2"] == 2 * 4 * 6144
    assert work["load"] == 800 + 2 * (100 + 4 * 6144)
    assert "float32" not in work and "cholesky" not in work


def test_scales_take_two_experts_once_more_runs_of_layers_and_correlations() -> None:
    one = task(measure="rtn", expert_bits=(1, 2))
    plain = stages.score(replace(one, recipe=one.recipe.with_changes(balance=False)))
    found = stages.score(one) - plain
    assert found["load"] == 2 * 4 * 6144  # the experts are small: all are read for columns' sizes
    assert found["float32"] == 2 * (2 * 100 * 32**2 + 32**3)
    assert found["product"] == 2 * 4 * 2 * 100 * 100  # four runs of each layer
    three = tuple(Linear(f"layers.0.mixer.{n}.weight", 8, 8) for n in "qko")
    several = replace(one, shape=replace(one.shape, layers=(Layer(100, three, False),)))
    assert stages._even_linears(several, several.shape.layers[0])["float32"] == 2 * 6400 + 8**3
    assert stages._find_scale(replace(one, sequences=1000))["float32"] == 2 * 6667 * 32**2 + 32**3


def test_quantize_by_hand() -> None:
    """Each expert once, at the width of the plan."""
    one = task(quantizer="rtn", correction=0.0)
    work = stages.quantize(one, stages.Widths({(1, 2): 3, (2, 2): 4, (0, 0): 1}, {}))
    assert work["nearest 1"] == 3 * 32 * 128
    assert work["nearest 2"] == 4 * 32 * 128 + 7 * 32 * 64


@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_a_linear_behind_the_experts_takes_a_run_of_its_layer(correction: float) -> None:
    """Two linears with 32 x 32 weights; the walk of the original runs for the first alone."""

    def of(second: str) -> tuple[Work, Work]:
        linears = tuple(Linear(f"layers.0.mixer.{n}.weight", 32, 32) for n in ("proj", second))
        one = task(1, quantizer="gptq", correction=correction)
        shape = replace(one.shape, layers=(Layer(100, linears, True),))
        named = {linear.name: (2, 3) for linear in linears}
        one = replace(one, shape=shape, open=named)
        widths = stages.Widths({}, dict.fromkeys(named, 2))
        return stages.score(one), stages.quantize(one, widths)

    for behind, beside in zip(of("fc2_latent_proj"), of("proj2"), strict=True):
        assert behind["attend"] - beside["attend"] == 100 * 20 * 2
        if not correction:
            assert behind["product"] - beside["product"] == 2 * 100 * 100


def test_linears_that_share_inputs() -> None:
    names = ("a.q", "a.k", "a.v", "a.o", "b.gate", "b.up", "b.down")
    cols = (8, 8, 8, 8, 8, 8, 16)
    linears = tuple(Linear(f"{n}.weight", 8, k) for n, k in zip(names, cols, strict=True))
    groups = Layer(0, linears, False).sharing_inputs([linear.name for linear in linears])
    assert [[linear.name[:-7] for linear in group] for group in groups] == [
        ["a.q", "a.k", "a.v"], ["a.o"], ["b.gate", "b.up"], ["b.down"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A model with a linear behind its experts."""
    model = make_model("nemotron_h", moe_latent_size=32)
    return save_model(model, tmp_path_factory.mktemp("latent"), tokenizer_folder)


@pytest.mark.parametrize("name", ["default", "fast"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "latent"])
def test_products_of_whole_stages(
    model_folder: Folder,
    latent: Path,
    text_file: Path,
    tmp_path: Path,
    family: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tiny models are float32, so the two kinds of products are counted together."""
    if family == "mixtral":  # costs of sketches of its experts
        monkeypatch.setattr(sketch, "ROWS", 16)
    folder = latent if family == "latent" else model_folder(family)
    request = Request.of(folder, small_recipe(text_file, name, bits=2.5), "cpu")
    source, recipe = request.source, request.recipe
    ids = calibration_ids(source, recipe)
    score(source, recipe.with_changes(sequences=1), ids=ids[:1])  # the error of codes, once
    with FlopCount() as scoring:
        scores = score_tensors(source, recipe, request.tensors, ids, tmp_path / "work")
    plan = allocate(scores, recipe)
    with FlopCount() as quantizing:
        quantize_tensors(source, plan, request.tensors, ids, tmp_path / "out")
    one = task_of(request)
    work = work_of(one, assumed_plan(request), request)
    scored = work["score"] + work.get("sensitivity", Work())
    assert scored["product"] + scored["float32"] == pytest.approx(scoring.flops, rel=0.15)
    quantized = stages.quantize(one, widths_of(plan, request))
    assert quantized["product"] + quantized["float32"] == pytest.approx(quantizing.flops, rel=0.15)
