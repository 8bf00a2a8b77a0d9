"""Scales of the inputs of experts: a model rounds alike however its norms scale channels."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.costs.scores import ExpertScores
from moepress.dequantize import dequantize
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import PLAN, shard_name
from moepress.format.codec import LEFT_OUT, PackedSpec
from moepress.format.quantization import packed_specs, quantization_of
from moepress.hf import load_model
from moepress.hf.packing import pack_modules
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts, set_activation_bits
from moepress.kernels.uncommon import UncommonExperts
from moepress.original.experts import ExpertWeights, Routed, RoutedExpert
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.rounding.channel_scale import CHANCE, LEAST_GAIN
from moepress.rounding.pre_quant_scale import (
    find_scale,
    scale_if_worth,
    with_plain_columns,
    with_scaled_columns,
)
from moepress.score import score
from moepress.store import statistics
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.uneven import uneven, with_uneven_norms

quantizing = importlib.import_module("moepress.quantize")  # the package has a function there

H = 64


def expert(scale: Tensor | None, columns: int = H) -> RoutedExpert:
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        torch.randn(32, columns, generator=generator), torch.randn(columns, 16, generator=generator)
    )
    choices = torch.zeros(9, 1, dtype=torch.int64), torch.rand(9, 1, generator=generator)
    routed = Routed(torch.randn(9, H, generator=generator), *choices)
    module = SimpleNamespace(_apply_gate=lambda p: F.silu(p[..., :16]) * p[..., 16:])
    return RoutedExpert(0, 0, module, weights, routed.with_pre_quant_scale(scale))


@pytest.mark.parametrize("columns", [H, H + 32])
def test_an_expert_with_scaled_inputs_is_the_same(columns: int) -> None:
    scale = uneven(H).bfloat16().float()
    plain, given = expert(None, columns), expert(scale, columns)
    scaled = with_scaled_columns(given)
    chunk = slice(2, 9)
    torch.testing.assert_close(scaled.inputs(chunk), plain.inputs(chunk) * scale)
    torch.testing.assert_close(scaled.output(chunk), plain.output(chunk), rtol=1e-4, atol=1e-4)
    back = with_plain_columns(scaled)
    assert back.routed.pre_quant_scale is None
    torch.testing.assert_close(back.weights.gate_up, plain.weights.gate_up)
    assert with_scaled_columns(plain) is plain


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_uneven_norms(model_folder(), tmp_path_factory.mktemp("uneven") / "model")


@pytest.fixture(scope="module", params=["default", "fast"])
def made(
    request: pytest.FixtureRequest,
    model: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, ExpertScores, BitAllocation]:
    """A compressed folder, its scores and its plan. One expert is left out."""
    folder = tmp_path_factory.mktemp("made") / request.param
    recipe = small_recipe(text_file, request.param, expert_bits=(0, 2), bits=1.6)
    scores = score(model, recipe)
    plan = allocate(scores, recipe)
    return quantize(model, plan, folder), scores, plan


def test_a_model_is_compressed_alike_however_its_norms_scale(
    model_folder: Callable[..., Path], model: Path, text_file: Path, tmp_path: Path
) -> None:
    ids = torch.arange(40, 80)[None]
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(model_folder())(ids).logits

        def measured(folder: Path, balance: bool) -> tuple[Any, float]:
            recipe = small_recipe(text_file, expert_bits=(2,), bits=2, balance=balance)
            scores = score(folder, recipe)
            assert bool(scores.scaled_layers) == (folder == model and balance)
            out = tmp_path / f"{folder.name}-{balance}"
            quantize(folder, allocate(scores, recipe), out)
            logits = AutoModelForCausalLM.from_pretrained(out)(ids).logits
            return scores.cost.sum(), float((logits - exact).square().mean())

        wanted, found = measured(model_folder(), True), measured(model, True)
        without = measured(model, False)
    assert found[0] == pytest.approx(wanted[0], rel=0.1)
    assert found[1] < 1.1 * wanted[1]
    assert without[0] > 1.3 * wanted[0]


def test_the_folder_says_which_layers_have_scales(
    made: tuple[Path, ExpertScores, BitAllocation], tmp_path: Path
) -> None:
    folder, scores, plan = made
    assert scores.scaled_layers == plan.scaled_layers == (0, 1)
    scores.save(tmp_path / "scores")
    assert ExpertScores.load(tmp_path / "scores").scaled_layers == (0, 1)
    assert BitAllocation.load(folder / PLAN).scaled_layers == (0, 1)
    assert quantization_of(folder).format_version == 7
    scaled = {name for name, spec in packed_specs(folder).items() if spec.pre_quant_scale}
    firsts = [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)]
    assert scaled == {*firsts}
    stored = 0
    for shard in folder.glob("*.safetensors"):
        if not shard.name.startswith("moepress_"):
            with safe_open(shard, framework="pt") as file:
                stored += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert stored == plan.total_bytes
    assert plan.digest() != replace(plan, scaled_layers=()).digest()
    with pytest.raises(CheckpointError, match=r"scaled inputs in layers \(5,\), expected some of"):
        replace(plan, scaled_layers=(5,))


def test_it_runs_as_the_plain_model_of_its_weights(
    made: tuple[Path, ExpertScores, BitAllocation], tmp_path: Path
) -> None:
    folder = made[0]
    ids = torch.arange(40, 80)[None]
    packed = AutoModelForCausalLM.from_pretrained(folder)
    set_activation_bits(packed, 16)
    plain = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "plain"))
    packed.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    set_activation_bits(saved, 16)
    with torch.inference_mode():
        logits = packed(ids).logits
        torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(saved(ids).logits, logits)


def test_experts_on_disk_scale_too(made: tuple[Path, ExpertScores, BitAllocation]) -> None:
    ids = torch.arange(40, 60)[None]
    size = sum(path.stat().st_size for path in made[0].glob("model*.safetensors"))
    on_disk = load_model(made[0], memory=size)
    assert statistics(on_disk) is not None
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(made[0])(ids).logits
        assert torch.equal(on_disk(ids).logits, expected)


def test_experts_that_run_together_are_of_plain_columns(
    made: tuple[Path, ExpertScores, BitAllocation],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _, plan = made
    monkeypatch.setattr(quantizing, "_run_together", lambda *_: True)
    again = quantize(model, plan, tmp_path / "together")
    first, second = (load_file(one / shard_name(0)) for one in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The next layer gets the outputs of weights whose columns are scaled back: equal but for
    # roundings, which decide a code here and there.
    first, second = (load_file(one / shard_name(1)) for one in (folder, again))
    for name, value in first.items():
        assert (value == second[name]).float().mean() > 0.95, name


def test_few_tokens_gain_nothing_by_chance(model_folder: Callable[..., Path]) -> None:
    source = Source(model_folder())
    for count in (2, 8, 40):
        walk = Walk(source, torch.arange(count)[None])
        with source.layer_loaded(0), torch.inference_mode():
            routed = walk.route(0)
            scale, gain = find_scale(walk, 0, routed)
            assert scale.shape == (source.hidden,)
            assert gain < LEAST_GAIN
            assert gain > -1 - CHANCE / count
            assert scale_if_worth(walk, 0, routed) is routed


@pytest.mark.parametrize(("family", "scaled"), [("doge", False), ("mixtral", True)])
def test_neurons_that_tokens_choose_have_no_scales(
    family: str,
    scaled: bool,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moepress.rounding.pre_quant_scale.LEAST_GAIN", -10)
    source = Source(save_model(make_model(family), tmp_path / family, tokenizer_folder))
    walk = Walk(source, torch.arange(40)[None])
    with source.layer_loaded(0), torch.inference_mode():
        found = scale_if_worth(walk, 0, walk.route(0))
    assert (found.pre_quant_scale is not None) == scaled


def test_a_layer_that_no_token_reaches_has_no_scales(model_folder: Callable[..., Path]) -> None:
    walk = Walk(Source(model_folder()), torch.arange(8)[None])
    with walk.source.layer_loaded(0), torch.inference_mode():
        routed = walk.route(0)
        nowhere = replace(routed, index=torch.full_like(routed.index, 1 << 20))
        assert find_scale(walk, 0, nowhere)[1] == 0
        assert scale_if_worth(walk, 0, nowhere) is nowhere


def packed_experts(scaled: bool, **uncommon: Any) -> PackedExperts:
    spec = PackedSpec((2, LEFT_OUT, 4), 32)
    arguments = 32, replace(spec, pre_quant_scale=scaled), spec, Gate("silu")
    torch.manual_seed(0)
    module = (
        UncommonExperts(3, 40, H, *arguments, False, False, **uncommon)
        if uncommon
        else PackedExperts(3, H, *arguments)
    )
    generator = torch.Generator().manual_seed(0)
    for packed in module.packed:
        packed.copy_(torch.randint(0, 60, packed.shape, generator=generator, dtype=torch.uint8))
    if scaled:
        module.get_parameter("gate_up_proj_pre_quant_scale").data = uneven(H)
    return module


@pytest.mark.parametrize(
    "uncommon", [{}, {"scales_input": True, "own": None}, {"scales_input": False, "own": None}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_multiply_their_inputs(uncommon: dict[str, Any], dtype: torch.dtype) -> None:
    plain, scaled = packed_experts(False, **uncommon), packed_experts(True, **uncommon)
    x = torch.randn(5, 40 if uncommon else H).to(dtype)
    choices = torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    found = scaled(x, *choices)
    assert found.dtype == dtype
    assert torch.equal(found, plain(x * uneven(H)[: x.shape[1]].to(dtype), *choices))


def test_scales_of_other_tensors_are_refused() -> None:
    model = make_model("mixtral")
    path = "model.layers.0.mlp.experts"
    experts = PackedSpec((2,) * 4, 32)
    scaled = replace(experts, pre_quant_scale=True)
    with pytest.raises(InputError, match=r"experts packed\. Inputs of down are scaled"):
        pack_modules(model, {f"{path}.gate_up_proj": experts, f"{path}.down_proj": scaled})
    linear = PackedSpec((4,), 32, pre_quant_scale=True)
    with pytest.raises(InputError, match=r"Expected it of experts only"):
        pack_modules(model, {"model.layers.0.self_attn.q_proj.weight": linear})


def test_what_older_versions_wrote_has_no_scales(
    made: tuple[Path, ExpertScores, BitAllocation], tmp_path: Path
) -> None:
    path = tmp_path / PLAN
    fields = json.loads((made[0] / PLAN).read_text())
    del fields["scaled_layers"]
    path.write_text(json.dumps(fields))
    assert BitAllocation.load(path).scaled_layers == ()
    assert PackedSpec.from_json({"bits": "2", "group_size": 32}).pre_quant_scale is False
    assert "pre_quant_scale" not in PackedSpec((2,), 32).to_json()
    spec = PackedSpec((2,), 32, pre_quant_scale=True)
    assert PackedSpec.from_json(spec.to_json()) == spec
    assert not Recipe.from_dict({**Recipe().to_dict(), "balance": False}).balance
