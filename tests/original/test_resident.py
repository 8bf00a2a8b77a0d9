"""A layer with all its experts in memory gives what it gives with one expert at a time."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.allocation.plan import BitAllocation
from moepress.compress import compress
from moepress.costs.sensitivity import measure_sensitivity
from moepress.format.checkpoint import PLAN
from moepress.original import resident
from moepress.original.resident import ResidentExperts
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.recipe import Recipe
from moepress.rounding import expert as rounding_experts
from moepress.rounding.expert import experts_at_once
from moepress.rounding.options import Rounding
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model

# Experts one by one or together; sigmoid routing; biases and limits; inputs scaled by the routing
# weights; neurons; experts without a gate; a loop of layers.
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "doge", "nemotron_h",
            "inkling2_loop_text")  # fmt: skip
quantizing = importlib.import_module("moepress.quantize")  # the package has a function there
IDS = (torch.arange(96) * 37 % 300 + 5).view(4, 24)


def on_card(monkeypatch: pytest.MonkeyPatch) -> list[ResidentExperts]:
    """Let walks take the experts of a layer together; returns a list that gets them."""
    found: list[ResidentExperts] = []

    def together(walk: Walk, layer: int) -> ResidentExperts:
        experts = walk.source.experts[layer]
        read = [walk.source.expert(layer, number) for number in range(experts.experts)]
        module = walk.experts_module(layer)
        found.append(ResidentExperts(layer, module, experts.form, read))
        return found[-1]

    monkeypatch.setattr(Walk, "resident", together)
    return found


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_folder: Path) -> Source:
    return Source(save_model(make_model(request.param), tmp_path / "model", tokenizer_folder))


def finished(source: Source) -> Tensor:
    walk = Walk(source, IDS)
    with Progress("forward", len(source.layers)) as progress:
        walk.finish(progress)
    return walk.states.clone()


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_forward(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finished(source)
    found = on_card(monkeypatch)
    close(finished(source), expected)
    assert {one.layer for one in found} == set(source.experts)


@torch.inference_mode()
def test_what_a_pass_returns(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, other = Walk(source, IDS), Walk(source, IDS)
    layer = next(iter(source.experts))
    if layer in walk.loop.layers:
        pytest.skip("the first layer with experts is inside the loop")
    for number in range(layer):
        with source.layer_loaded(number):
            walk.pass_layer(number)
            other.pass_layer(number)
    with source.layer_loaded(layer):
        expected = walk.pass_layer(layer)
        on_card(monkeypatch)
        found = other.pass_layer(layer)
    assert expected is not None and found is not None
    for name in ("hidden", "weight"):
        close(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.index, expected.index)
    assert found.scales_input == expected.scales_input


def test_backward(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str) -> list[dict[str, Tensor]]:
        folder = tmp_path / name
        folder.mkdir()
        found = measure_sensitivity(source, IDS, folder, {"model": name}, seed=0)
        return [dict(found.layer(layer)) for layer in range(len(source.layers))]

    expected = measured("one by one")
    on_card(monkeypatch)
    for found, wanted in zip(measured("together"), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert value.any(), name
            assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are in float32: in bfloat16 both ways give the same numbers."""
    folder = save_model(make_model("mixtral").bfloat16(), tmp_path / "model")
    source = Source(folder)
    expected = finished(source)
    on_card(monkeypatch)
    assert torch.equal(finished(source), expected)


def test_experts_stay_on_disk_without_a_card_or_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(save_model(make_model("mixtral"), tmp_path / "model"))
    walk = Walk(source, IDS)
    assert walk.resident(0) is None
    monkeypatch.setattr(source, "device", torch.device("cuda"))
    monkeypatch.setattr(resident, "free_memory", lambda device: 1000)
    assert walk.resident(0) is None


def test_without_a_card_no_experts_are_begun(tmp_path: Path) -> None:
    source = Source(save_model(make_model("mixtral"), tmp_path / "model"))
    walk = Walk(source, IDS)
    with source.layer_loaded(0):
        reading = source.upcoming._reading
        walk.expect(0)
        assert source.upcoming._reading is reading
        assert walk._coming._begun is None


@pytest.mark.parametrize("left_out", [False, True])
def test_rounded_experts_that_run_together(
    left_out: bool, tmp_path: Path, text_file: Path, tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same bytes: all tokens are in one batch, and no inputs of experts are scaled."""
    folder = save_model(make_model("mixtral"), tmp_path / "model", tokenizer_folder)
    few = {"expert_bits": (0, 2), "per_projection": False} if left_out else {}
    few |= {"bits": 1.8 if left_out else 2.5, "balance": False}
    recipe = small_recipe(text_file, "default", **few)
    first = compress(folder, tmp_path / "one by one", recipe)
    on_card(monkeypatch)
    monkeypatch.setattr(quantizing, "_run_together", lambda *_: True)
    second = compress(folder, tmp_path / "together", recipe)
    for path in first.glob("model*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    plan = BitAllocation.load(first / PLAN)
    assert (plan.bits == 0).any() == left_out


def test_how_many_experts_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(save_model(make_model("mixtral"), tmp_path / "model"))
    rounding = Rounding.of_experts(Recipe.load("default", bits=2.5), "gptq")
    assert experts_at_once(source, 0, rounding) == (1, 1)  # no card
    monkeypatch.setattr(source, "device", torch.device("cuda"))
    found = []
    for megabytes in range(1, 40):
        monkeypatch.setattr(rounding_experts, "free_memory", lambda _, m=megabytes: m << 17)
        found.append(experts_at_once(source, 0, rounding))
        kept = experts_at_once(source, 0, rounding, kept=True)
        assert kept <= found[-1] and 1 <= found[-1].downs <= found[-1].experts
    assert found == sorted(found)
    assert found[0] == (1, 1) and found[-1] == (4, 4)
