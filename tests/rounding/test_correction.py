"""Corrections for errors of the layers before, against least squares in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.format.codec import Codec
from moepress.original import batches as batch_sizes
from moepress.original.experts import Routed, RoutedExpert, expert_hidden
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.recipe import Recipe
from moepress.rounding import factor as factor_module
from moepress.rounding.correction import Correction
from moepress.rounding.hessian import Hessian
from moepress.rounding.inputs import Inputs
from moepress.rounding.linear import linear_inputs
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.options import Rounding
from tests.conftest import FAMILIES, small_recipe
from tests.original.test_walk import some_ids
from tests.rounding.alone import round_down, round_gate_up

Folder = Callable[..., Path]
DAMPING = 0.01


def moved_inputs(tokens: int = 400, features: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs now and in the original model [T, K], and what each token counts [T]."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(tokens, features, generator=generator)
    mixed = original @ torch.randn(features, features, generator=generator)
    noise = torch.randn(tokens, features, generator=generator)
    return original + 0.05 * mixed + 0.2 * noise, original, torch.rand(tokens, generator=generator)


def random_weight(rows: int = 24, cols: int = 32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [40, 400])
def test_corrected_is_a_ridge_regression(
    strength: float, weighted: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W* - W is the ridge regression of the difference of outputs on the inputs, as one system."""
    monkeypatch.setattr(factor_module, "COLUMNS_PER_SLICE", 12)
    now, original, count = moved_inputs(tokens)
    w = random_weight()
    correction, hessian = Correction(32, "cpu"), Hessian(32, "cpu")
    more_rows = torch.cat([w, w.flip(0)])  # than columns: M H^-1 is solved for
    for part in (slice(0, 15), slice(15, None)):
        each = count[part] if weighted else None
        correction.add(now[part], original[part], each)
        hessian.add(now[part], each)
    got = correction.corrected(w, hessian.copy(), DAMPING, strength)
    got_more = correction.corrected(more_rows, hessian.copy(), DAMPING, strength)

    weight = (count if weighted else torch.ones_like(count)).double()
    root = weight.sqrt()[:, None]
    x, wide = now.double() * root, w.double()
    effective = weight.sum() ** 2 / weight.square().sum()
    damping = max(DAMPING, 32 / effective)
    ridge = (damping * x.square().sum(0).mean()).sqrt() * torch.eye(32, dtype=torch.float64)
    lacking = (original.double() - now.double()) * root @ wide.T
    system, goal = torch.cat([x, ridge]), torch.cat([lacking, torch.zeros(32, 24)])
    expected = wide + strength * torch.linalg.lstsq(system, goal).solution.T
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    both = torch.cat([expected, expected.flip(0)])
    torch.testing.assert_close(got_more.double(), both, rtol=1e-4, atol=1e-4)
    alone = Correction(32, "cpu", w)  # sums W M, as for `down`
    for part in (slice(0, 15), slice(15, None)):
        alone.add(now[part], original[part], count[part] if weighted else None)
    summed = alone.corrected(w, hessian.copy(), DAMPING, strength)
    torch.testing.assert_close(summed.double(), expected, rtol=1e-4, atol=1e-4)
    if strength == 0:
        assert torch.equal(got, w) and torch.equal(summed, w)
    hessian.factor(DAMPING)  # a copy was used up, not this one


@pytest.mark.parametrize(("rows", "alone"), [(24, False), (24, True), (40, False)])
def test_products_in_16_bits_change_little(
    rows: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One percent of the correction. Of the gain less: it is a mean of many roundings."""
    monkeypatch.setattr(factor_module, "COLUMNS_PER_SLICE", 12)
    now, original, count = moved_inputs()
    w = random_weight(rows)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        correction, hessian = Correction(32, "cpu", w if alone else None), Hessian(32, "cpu")
        correction.add(now, original, count, dtype)
        hessian.add(now, count)
        moved = correction.corrected(w, hessian.copy(), DAMPING, 1.0, dtype) - w
        found.append((moved, correction.gain(w, w.round(), hessian.factor(DAMPING), dtype)))
    (exact, gain), (narrow, narrow_gain) = found
    assert 0 < (narrow - exact).norm() < 0.01 * exact.norm()
    assert narrow_gain == pytest.approx(gain, rel=2e-3)


def test_without_tokens_or_drift_the_weight_stays() -> None:
    now, _, count = moved_inputs()
    correction, hessian = Correction(32, "cpu"), Hessian(32, "cpu")
    w = random_weight()
    assert torch.equal(correction.corrected(w, hessian.copy(), DAMPING, 1.0), w)
    correction.add(now, now, count)
    hessian.add(now, count)
    assert torch.equal(correction.corrected(w, hessian, DAMPING, 1.0), w)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("damping", [1e-6, 0.5])
@pytest.mark.parametrize("alone", [False, True])
def test_gain_is_least_squares(
    weighted: bool, damping: float, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best gain of all outputs, token by token in float64, whatever the damping is."""
    monkeypatch.setattr(factor_module, "COLUMNS_PER_SLICE", 12)
    now, original, count = moved_inputs()
    w = random_weight()
    rounded = w.round()
    correction, hessian = Correction(32, "cpu", w if alone else None), Hessian(32, "cpu")
    each = count if weighted else None
    correction.add(now, original, each)
    hessian.add(now, each)
    got = correction.gain(w, rounded, hessian.factor(damping))

    root = (count if weighted else torch.ones_like(count)).double().sqrt()[:, None]
    x, before = now.double() * root, original.double() * root
    wanted, output = before @ w.double().T, x @ rounded.double().T
    expected = float((wanted * output).sum() / output.square().sum())
    assert got == pytest.approx(expected, rel=1e-5)
    assert abs(got - 1) > 0.01


def test_the_gain_is_1_without_tokens_or_outputs() -> None:
    w = random_weight()
    matrix = quantize_matrix("rtn", w, Codec(2, 32))
    for drifts in (False, True):
        inputs = Inputs(32, "cpu", "int", drifts)
        assert inputs.rescaled(matrix, w, inputs.factor(DAMPING)) is matrix
    now, original, _ = moved_inputs()
    correction, hessian = Correction(32, "cpu"), Hessian(32, "cpu")
    correction.add(now, original)
    hessian.add(now)
    assert correction.gain(w, torch.zeros_like(w), hessian.factor(DAMPING)) == 1


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_inputs_of_one_matrix_of_few_rows_give_the_same(family: str) -> None:
    now, original, count = moved_inputs()
    w, matrix = random_weight(16), quantize_matrix("rtn", random_weight(16), Codec(2, 32))
    found = []
    for weight in (None, w, random_weight(17)):  # 17 rows: M is summed
        inputs = Inputs(32, "cpu", family, True, weight)
        inputs.add(now, original, count)
        moved = inputs.corrected(w, DAMPING, 0.5)
        found.append((moved, inputs.rescaled(matrix, w, inputs.factor(DAMPING))))
    for moved, rescaled in found[1:]:
        torch.testing.assert_close(moved, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rescaled.dequantize(), found[0][1].dequantize())
    assert not torch.allclose(found[0][0], w, atol=1e-3)


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_few_tokens_damp_trellis_codes(family: str) -> None:
    """100 tokens, half of them of weight 0, count as 50."""
    x = moved_inputs(100)[0]
    count = torch.arange(100).remainder(2).float()
    inputs = Inputs(32, "cpu", family, False)
    inputs.add(x[:60], None, count[:60])
    inputs.add(x[60:], None, count[60:])
    expected = DAMPING if family == "int" else 0.15 * 32 / 50
    assert inputs.factor(DAMPING).damping == pytest.approx(expected)
    plenty = Inputs(32, "cpu", family, False)
    plenty.add(moved_inputs(4000)[0], None)
    assert plenty.factor(DAMPING).damping == DAMPING


def test_a_correction_fitted_to_noise_does_little_harm() -> None:
    """Inputs that differ by noise alone: a fit to few tokens must not hurt on others."""
    now, _, _ = moved_inputs(4064)
    original = now + torch.randn(now.shape, generator=torch.Generator().manual_seed(3))
    correction, hessian = Correction(32, "cpu"), Hessian(32, "cpu")
    correction.add(now[:48], original[:48])
    hessian.add(now[:48])
    w = random_weight()
    change = correction.corrected(w, hessian, DAMPING, 0.5) - w
    lacking = (original - now)[48:] @ w.T
    assert (lacking - now[48:] @ change.T).norm() < 1.1 * lacking.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", ["int", "trellis"])
@pytest.mark.parametrize("twice", [False, True])
def test_linears_are_corrected_for_their_own_inputs(
    model_folder: Folder,
    family: str,
    codec: str,
    twice: bool,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every linear of a layer but the experts: the same as from all its inputs at once.

    With rotated inputs too, and where a layer calls a linear more than once.
    """
    monkeypatch.setattr(batch_sizes, "BATCH_TOKENS", 48)
    source = Source(model_folder(family))
    walk = Walk(source, some_ids())
    twin = walk.fork()
    walk.states += 0.1 * torch.randn(walk.states.shape, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(twin.states, walk.states)
    with source.loaded(source.layer_paths[0]), torch.inference_mode():
        named = source.layers[0].named_modules()
        modules = {n: m for n, m in named if type(m) is torch.nn.Linear}
        if twice:
            first, forward = next(iter(modules.values())), source.layers[0].forward

            def again(states: Tensor, *args: object, **kwargs: object) -> object:
                first(2 * states.flip(1))
                return forward(states, *args, **kwargs)

            monkeypatch.setattr(source.layers[0], "forward", again)
        rounding = Rounding.of_linears(Recipe(linear_codec=codec), "gptq")
        groups = linear_inputs(walk, 0, modules, rounding, twin)
        assert sorted(n for names, _ in groups for n in names) == sorted(modules)
        assert len(groups) < len(modules)  # some have the same inputs
        wanted = {
            name: inputs.corrected(modules[name].weight, 0.9, 1.0)
            for names, inputs in groups
            for name in names
        }
        now, original = (inputs_of(w, modules) for w in (walk, twin))
        for name, module in modules.items():
            correction = Correction(module.in_features, "cpu")
            hessian = Hessian(module.in_features, "cpu")
            correction.add(now[name], original[name])
            hessian.add(now[name])
            # Strong damping makes this well conditioned: only the order of sums differs.
            expected = correction.corrected(module.weight, hessian, 0.9, 1.0)
            assert not torch.equal(expected, module.weight)
            torch.testing.assert_close(wanted[name], expected, rtol=1e-4, atol=1e-5)


def inputs_of(walk: Walk, modules: dict[str, torch.nn.Linear]) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: kept[n].append(args[0].flatten(0, -2)))
        for n, m in modules.items()
    ]
    walk.run_for_hooks(0)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def test_a_twin_walks_through_the_original_model(model_folder: Folder) -> None:
    """Inputs of the experts and states after the layer are those of the original model."""
    source = Source(model_folder())
    alone, walk = Walk(source, some_ids()), Walk(source, some_ids())
    twin = walk.fork()
    with source.loaded(source.layer_paths[0]), torch.inference_mode():
        routed = alone.route(0)
        alone.advance(0, alone.experts_output(0, routed))
        walk.states += 1
        passed = twin.pass_layer(0)
    assert passed is not None and torch.equal(passed.hidden, routed.hidden)
    assert torch.equal(twin.states, alone.states)


@pytest.mark.parametrize("codec", ["int", "trellis"])
def test_rounded_experts_are_nearer_to_the_original_outputs(
    model_folder: Folder, text_file: Path, codec: str
) -> None:
    """At 4 bits, with inputs that moved, correction removes a third of the error or more."""
    source = Source(model_folder())
    weights = source.expert(0, 0)
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(600, source.hidden, generator=generator)
    moved = original + 0.3 * original.roll(1, dims=1)
    index, weight = torch.zeros(600, 1, dtype=torch.int64), torch.ones(600, 1)
    module = source.model.get_submodule(source.experts[0].path)
    wanted = expert_hidden(module, weights.gate_up, original) @ weights.down.T
    error = {}
    for strength in (0.0, 1.0):
        recipe = small_recipe(
            text_file, expert_codec=codec, expert_bits=(4,), correction=strength, damping=1e-3
        )
        routed = Routed(moved, index, weight, original=original)
        expert = RoutedExpert(0, 0, module, weights, routed)
        rounding = Rounding.of_experts(recipe, "gptq")
        (gate_up,) = round_gate_up(expert, rounding, (4,))
        rounded = gate_up.dequantize()
        (down,) = round_down(expert, rounded, rounding, (4,))
        output = expert_hidden(module, rounded, moved) @ down.dequantize().T
        error[strength] = float((output - wanted).norm() / wanted.norm())
    assert error[1.0] < 0.7 * error[0.0]


@pytest.mark.parametrize("codec", ["int", "trellis"])
def test_down_is_scaled_to_the_original_outputs(
    model_folder: Folder, text_file: Path, codec: str
) -> None:
    """The best gain of a rounded expert's outputs towards the original's is 1."""
    source = Source(model_folder())
    weights = source.expert(0, 0)
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(600, source.hidden, generator=generator)
    original = 1.2 * moved
    index, weight = torch.zeros(600, 1, dtype=torch.int64), torch.ones(600, 1)
    module = source.model.get_submodule(source.experts[0].path)
    wanted = expert_hidden(module, weights.gate_up, original) @ weights.down.T
    recipe = small_recipe(text_file, expert_codec=codec, damping=1e-3)
    factors = []
    for states in (original, None):
        routed = Routed(moved, index, weight, original=states)
        expert = RoutedExpert(0, 0, module, weights, routed)
        rounding = Rounding.of_experts(recipe, "gptq")
        (gate_up,) = round_gate_up(expert, rounding, (2,))
        rounded = gate_up.dequantize()
        hidden = expert_hidden(module, rounded, moved)
        downs = round_down(expert, rounded, rounding, (1, 2))
        outputs = [hidden @ down.dequantize().T for down in downs]
        factors.append([float((wanted * y).sum() / y.square().sum()) for y in outputs])
    known, unknown = factors
    assert known == pytest.approx([1, 1], abs=2**-8)  # the rounding of bfloat16 scales
    assert all(abs(factor - 1) > 0.1 for factor in unknown), unknown
