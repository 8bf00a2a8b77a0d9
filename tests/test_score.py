"""Scores against the whole block with one expert swapped; interrupted runs resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moepress.allocation.budget import budget_range
from moepress.allocation.tensors import ModelTensors
from moepress.calibrate import Calibration, calibrate
from moepress.costs.scores import ROUNDED, ExpertScores
from moepress.costs.sensitivity import EXPERTS, SENSITIVITY, Sensitivity
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import save_tensors
from moepress.format.codec import codec_for
from moepress.original.experts import ExpertWeights, Routed, expert_forward
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.recipe import Recipe
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.options import Rounding
from moepress.rounding.tokens import TokenPolicy, hessian_tokens
from moepress.score import score, unmeasured
from moepress.work import calibration_ids
from tests.conftest import small_recipe

Folder = Callable[..., Path]
# Walk and transformers differ in the order of float32 sums only, of a few hundred terms each: by
# 1e-6 to 1e-7 of a sum of squares. Errors that these tests are to find are far above 1e-4.
FLOAT32 = 1e-4


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_epsilon_is_what_swapping_the_expert_costs_the_block(
    model_folder: Folder, text_file: Path, family: str
) -> None:
    """The oracle: the whole block with one expert replaced, on all tokens, by transformers."""
    folder = model_folder(family)
    recipe = small_recipe(text_file, measure="rtn", expert_bits=(2, 3), balance=False)
    source = Source(folder)
    scores = score(source, recipe)
    layer = source_layer = max(source.experts)
    row = scores.layers.index(layer)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = model.get_submodule(source.experts[source_layer].path)
    calls = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.inference_mode():
        model(calibration_ids(source, recipe))
    handle.remove()
    (args,) = calls
    with torch.inference_mode():
        exact = experts(*args).double()
        for expert in (0, 3):
            for column, bits in enumerate(recipe.expert_bits):
                originals = ExpertWeights(
                    experts.gate_up_proj[expert].clone(), experts.down_proj[expert].clone()
                )
                rounded = ExpertWeights(
                    *(
                        quantize_matrix("rtn", w, codec_for(bits, w.shape[1], 32)).dequantize()
                        for w in originals[:2]
                    )
                )
                for part, name in enumerate(ROUNDED):
                    if name in ("gate_up", "both"):
                        experts.gate_up_proj[expert] = rounded.gate_up
                    if name in ("down", "both"):
                        experts.down_proj[expert] = rounded.down
                    swapped = (experts(*args).double() - exact).square().sum().item()
                    experts.gate_up_proj[expert] = originals.gate_up
                    experts.down_proj[expert] = originals.down
                    measured = scores.squared_error[row, expert, part, column]
                    assert measured == pytest.approx(swapped, rel=FLOAT32), (expert, bits, name)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_costs_are_errors_weighed_by_sensitivity(
    model_folder: Folder, text_file: Path, tmp_path: Path, family: str
) -> None:
    """The oracle: the output error of every single token, of experts and of linears."""
    source = Source(model_folder(family))
    prose = tmp_path / "prose.txt"
    prose.write_text("It was the best of times, it was the worst of times.\n" * 200)
    sources = ((str(text_file), 1.0), (str(prose), 2.0))
    recipe = small_recipe(
        text_file, "default", measure="rtn", expert_bits=(2,), linear_bits=(3, 8), calib=sources,
        balance=False,
    )  # fmt: skip
    scores = score(source, recipe, work=tmp_path / "work")
    ids = calibration_ids(source, recipe)
    origin = torch.tensor([0, 0, 1, 1, 1, 1]).repeat_interleave(32)  # a third, two thirds
    assert scores.text_tokens == (64, 128)
    walk = Walk(source, ids)
    known = Sensitivity(tmp_path / "work" / SENSITIVITY)
    linears = iter(range(len(scores.linears)))
    for layer in range(len(source.layers)):
        with source.loaded(source.layer_paths[layer]), torch.inference_mode():
            s = known.layer(layer)
            for name, module in source.packable[layer].items():
                m = next(linears)
                assert scores.linears[m] == name
                inputs: list[torch.Tensor] = []
                handle = module.register_forward_pre_hook(
                    lambda _, args, to=inputs: to.append(args[0].flatten(0, -2))
                )
                walk.run_for_hooks(layer)
                handle.remove()
                x, weight = torch.cat(inputs), source.current(name)
                for bits in (3, 8):
                    column = scores.linear_bits.index(bits)
                    codec = Rounding.of_linears(recipe, "rtn").codec(bits, weight.shape[1])
                    assert codec.family == ("trellis" if bits == 3 else "int")
                    rounded = quantize_matrix("rtn", weight, codec).dequantize()
                    difference = weight - rounded
                    error = (x @ difference.T).square().sum(1).mean()
                    # The damping adds so much of the mean energy of an input to each of them.
                    damping = max(recipe.damping, 0.15 * x.shape[1] / len(x))  # trellis codes
                    error += damping * x.square().mean() * difference.square().sum()
                    expected = [float(s[name][origin == d].sum() * error) for d in (0, 1)]
                    measured = scores.linear_cost[:, m, column]
                    assert measured == pytest.approx(expected, rel=1e-3)
            if layer not in source.experts:
                walk.advance(layer, None)
                continue
            routed = walk.route(layer)
            module = walk.experts_module(layer)
            row = scores.layers.index(layer)
            for expert in range(source.experts[layer].experts):
                tokens, places = routed.of(expert)
                gate = routed.weight[tokens, places]
                weights = source.expert(layer, expert)
                rounded = ExpertWeights(*(
                    quantize_matrix(
                        "rtn", w, codec_for(2, w.shape[1], 32, "trellis")
                    ).dequantize() for w in weights[:2]
                ))  # fmt: skip
                x = routed.hidden[tokens]
                error = expert_forward(module, weights, x) - expert_forward(module, rounded, x)
                cost = (error * gate[:, None]).square().sum(1) * s[EXPERTS][tokens]
                for d in (0, 1):
                    expected = float(cost[origin[tokens] == d].sum())
                    measured = scores.cost[d, row, expert, ROUNDED.index("both"), 0]
                    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-12)
            walk.advance(layer, walk.experts_output(layer, routed))


def test_energies_are_those_of_the_model(model_folder: Folder, text_file: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder("mixtral")
    recipe = small_recipe(text_file, measure="rtn")
    source = Source(folder)
    scores = score(source, recipe)
    model = AutoModelForCausalLM.from_pretrained(folder)
    outputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.inference_mode():
        # hidden_states[1] is what layer 0 gives; the last one is normed, so layer 1 is not compared
        states = model(calibration_ids(source, recipe), output_hidden_states=True).hidden_states
    for row in range(2):
        expected = outputs[row].double().square().sum().item()
        assert scores.output_energy[row] == pytest.approx(expected, rel=FLOAT32)
    squares = states[1].double().square().sum(-1)  # of one batch
    residual = squares.median().item() * squares.numel()
    assert scores.residual_energy[0] == pytest.approx(residual, rel=FLOAT32)


def test_more_bits_cost_less_and_gptq_less_than_rtn(model_folder: Folder, text_file: Path) -> None:
    folder = model_folder("mixtral")
    gptq = score(folder, small_recipe(text_file, expert_bits=(2, 4)))
    rtn = score(folder, small_recipe(text_file, expert_bits=(2, 4), measure="rtn"))
    assert (gptq.squared_error[..., 1] < gptq.squared_error[..., 0]).all()
    assert gptq.squared_error.sum() < rtn.squared_error.sum()


def test_statistics_add_up(model_folder: Folder, text_file: Path) -> None:
    recipe = small_recipe(text_file, measure="rtn")
    scores = score(model_folder("qwen2_moe"), recipe)
    assert scores.total_tokens == 6 * 32
    assert (scores.tokens.sum(axis=1) == 6 * 32 * 3).all()  # top-3
    calibration = calibrate(Source(model_folder("qwen2_moe")), recipe)
    assert np.array_equal(calibration.tokens, scores.tokens)
    assert np.allclose(calibration.routing_weight, scores.routing_weight)
    assert np.allclose(calibration.frequency.sum(axis=1), 3)


def test_a_resumed_run_gives_the_same_scores(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module = importlib.import_module("moepress.score")
    recipe = small_recipe(text_file)
    whole = score(model_folder(), recipe, work=tmp_path / "whole")
    real = module.score_layer

    def dies(walk: Walk, layer: int, *args: object) -> object:
        if layer == 1:
            raise KeyboardInterrupt
        return real(walk, layer, *args)

    monkeypatch.setattr(module, "score_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        score(model_folder(), recipe, work=tmp_path / "cut")
    monkeypatch.setattr(module, "score_layer", real)
    again = score(model_folder(), recipe, work=tmp_path / "cut")
    again.save(tmp_path / "again.safetensors")
    whole.save(tmp_path / "whole.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


def test_work_of_another_recipe_is_refused(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    score(model_folder(), small_recipe(text_file, measure="rtn"), work=tmp_path)
    with pytest.raises(InputError, match="differs in: recipe"):
        score(model_folder(), small_recipe(text_file, measure="gptq"), work=tmp_path)


def test_scores_round_trip(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    scores = score(model_folder(), small_recipe(text_file, measure="rtn"))
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    loaded = ExpertScores.load(path)
    for name, value in vars(scores).items():
        same = getattr(loaded, name)
        if name == "recipe":
            assert Recipe.from_dict(same) == Recipe.from_dict(value)
        else:
            assert np.array_equal(value, same) if isinstance(value, np.ndarray) else value == same
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        ExpertScores.load(path)


def test_calibration_round_trip(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    calibration = calibrate(model_folder(), small_recipe(text_file, token_floor=100))
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert np.array_equal(loaded.tokens, calibration.tokens)
    assert loaded.below_floor() == calibration.below_floor()
    below = {(layer, expert) for layer, expert, _ in loaded.below_floor()}
    for row, layer in enumerate(loaded.layers):
        for expert, count in enumerate(loaded.tokens[row]):
            assert ((layer, expert) in below) == (count < 100)


def routed_example() -> Routed:
    index = torch.tensor([[0, 1]] * 10 + [[2, 1]] * 2 + [[0, 4]] * 8)  # 4: no expert, of 4
    weight = torch.full((20, 2), 0.5)
    return Routed(torch.randn(20, 8), index, weight)


def test_an_expert_with_few_tokens_borrows_others() -> None:
    routed = routed_example()
    policy = TokenPolicy(by_routing_weight=True, floor=6, seed=0)
    own, counts = hessian_tokens(routed, 0, 0, policy)
    assert own.tolist() == [*range(10), *range(12, 20)] and (counts == 0.25).all()
    tokens, counts = hessian_tokens(routed, 0, 2, policy)
    assert tokens[:2].tolist() == [10, 11] and len(set(tokens.tolist())) == 6
    assert torch.allclose(counts, torch.tensor([0.25, 0.25] + [0.025] * 4))
    never, _ = hessian_tokens(routed, 0, 3, policy)
    assert len(never) == 6
    again, _ = hessian_tokens(routed, 0, 3, policy)
    assert torch.equal(never, again)
    other_layer, _ = hessian_tokens(routed, 1, 3, policy)
    assert not torch.equal(never, other_layer)


def test_hessian_weight_and_token_floor_change_the_tokens() -> None:
    routed = routed_example()
    _, plain = hessian_tokens(routed, 0, 0, TokenPolicy(by_routing_weight=False, floor=0, seed=0))
    assert (plain == 1).all()
    few, _ = hessian_tokens(routed, 0, 2, TokenPolicy(by_routing_weight=True, floor=0, seed=0))
    assert len(few) == 2
    all_of_them, _ = hessian_tokens(
        routed, 0, 2, TokenPolicy(by_routing_weight=True, floor=1000, seed=0)
    )
    assert len(all_of_them) == 20


def test_experts_with_few_tokens_are_reported(
    model_folder: Folder, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    score(model_folder(), small_recipe(text_file, measure="rtn", token_floor=1000))
    assert "8 of 8 experts saw fewer than 1000 calibration tokens: their scores" in caplog.text
    caplog.clear()
    score(model_folder(), small_recipe(text_file, measure="rtn", token_floor=0))
    assert "calibration tokens" not in caplog.text


def test_a_linear_that_no_gradient_reaches_keeps_the_usual_width(
    model_folder: Folder,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its cost is unknown, not 0: it must not get the smallest width."""
    name = "model.layers.1.self_attn.k_proj.weight"
    real = Sensitivity.layer
    monkeypatch.setattr(
        Sensitivity,
        "layer",
        lambda self, i: {n: s * (n != name) for n, s in real(self, i).items()},
    )
    scores = score(model_folder(), small_recipe(text_file, "default", measure="rtn"))
    assert f"every token of {name}" in caplog.text
    costs = scores.linear_cost[0, scores.linears.index(name)]
    assert np.isfinite(costs).tolist() == [bits == 4 for bits in scores.linear_bits]


def test_scores_of_another_version_are_refused(tmp_path: Path) -> None:
    save_tensors(
        tmp_path / "old.safetensors", {"tokens": torch.zeros(1)}, '{"kind": "moepress scores"}'
    )
    with pytest.raises(CheckpointError, match=r"has no field.*Score again"):
        ExpertScores.load(tmp_path / "old.safetensors")


def test_budgets_are_known_before_anything_is_measured(
    model_folder: Folder, text_file: Path
) -> None:
    """So that an impossible one is refused at once. Open tensors are offered different widths."""
    source = Source(model_folder())
    recipe = small_recipe(text_file, "default", measure="rtn", expert_bits=(1, 2))
    before = unmeasured(source, recipe, ModelTensors.of(source, recipe))
    assert budget_range(before, recipe) == budget_range(score(source, recipe), recipe)
