"""Drawn errors: what is left after feedback is as defined, and costs are those of the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moepress.costs import linear_costs, noisy_expert
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError, NumericalError
from moepress.format.codec import TRELLIS_BITS, Codec
from moepress.kernels import cpu
from moepress.kernels.trellis import TILE_COLUMNS, rotate
from moepress.recipe import Recipe
from moepress.rounding import methods
from moepress.rounding import noise as noise_module
from moepress.rounding import sweep as sweep_module
from moepress.rounding.factor import DenseFactor, block_feedback
from moepress.rounding.fit import within_blocks
from moepress.rounding.hessian import Hessian
from moepress.rounding.linear import output_cost
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.noise import (
    code_error,
    draw,
    drawn_errors,
    noisy_weights,
)
from moepress.score import score
from tests.conftest import small_recipe
from tests.rounding.test_trellis import DISTORTION

Folder = Callable[..., Path]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weight_and_factor(rows: int, cols: int) -> tuple[Tensor, DenseFactor]:
    """Weights, and inputs some directions of which are much larger than others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * cols, cols, generator=generator) * torch.logspace(0, -1.5, cols)
    x = x @ torch.linalg.qr(torch.randn(cols, cols, generator=generator))[0]
    hessian = Hessian(cols, "cpu")
    hessian.add(rotate(x))
    scales = 0.01 + torch.rand(rows, 1, generator=generator)
    return torch.randn(rows, cols, generator=generator) * scales, hessian.factor(0.01)


def test_a_draw_depends_on_its_name_and_seed_alone(threads: Callable[[int], None]) -> None:
    threads(1)
    first = draw((128, 64), 0, "layer 0")
    threads(2)
    assert torch.equal(first, draw((128, 64), 0, "layer 0")) and first.shape == (64, 128)
    assert not torch.equal(first, draw((128, 64), 1, "layer 0"))
    assert not torch.equal(first, draw((128, 64), 0, "layer 1"))
    assert abs(first.mean()) < 0.05 and first.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("error", [0.3, 0.005])
def test_what_is_left_after_feedback_is_the_draw(error: float) -> None:
    """E V = r, r from the adjusted weights W + E V - E by the definition, block by block."""
    weight, factor = weight_and_factor(96, 64)
    target, noise = weight.T.contiguous(), draw((96, 64), 0, "x")
    feedback = block_feedback(factor.feedback)
    errors, residual = (x.T.double() for x in drawn_errors(target, feedback, error, noise))
    left = errors @ feedback.double()
    torch.testing.assert_close(residual, left, rtol=1e-4, atol=1e-5)
    root = within_blocks(residual.T.float(), factor.diagonal_blocks(8)).T
    torch.testing.assert_close(
        root, (errors @ factor.feedback.double()).float(), rtol=1e-4, atol=1e-5
    )
    product = torch.cat(list(factor.products(target))).T
    torch.testing.assert_close(product, weight @ factor.feedback, rtol=1e-4, atol=1e-5)
    adjusted = weight.double() + left - errors
    for start in range(0, 64, TILE_COLUMNS):
        block = slice(start, start + TILE_COLUMNS)
        a = adjusted[:, block]
        deviation = (error * (1 - error) * a.square().mean()).sqrt()
        r = error * a + deviation * noise[block].T
        torch.testing.assert_close(left[:, block], r, rtol=1e-4, atol=1e-5)
    spread = left.square().mean() / adjusted.square().mean()
    assert spread == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_error_of_a_code(bits: float) -> None:
    assert code_error(bits, 2048) == pytest.approx(DISTORTION[bits], rel=0.03)
    assert code_error(bits, 65536) == code_error(bits, 2048)
    generator = torch.Generator().manual_seed(1)
    for rows in (32, 64, 100, 128):
        weight = torch.randn(rows, 256, generator=generator)
        rounded = quantize_matrix("rtn", weight, Codec(bits, 32, "trellis")).dequantize()
        error = (weight - rounded).square().mean() / weight.square().mean()
        assert code_error(bits, rows) == pytest.approx(float(error), rel=0.05)
    assert code_error(bits, 64) > 1.2 * code_error(bits, 2048)


@pytest.mark.parametrize("rows", [192, 100])
def test_errors_cost_what_those_of_the_search_cost(rows: int) -> None:
    weight, factor = weight_and_factor(rows, 128)
    noisy = noisy_weights(weight, TRELLIS_BITS, factor, draw(weight.shape, 0, "x"))
    for bits, found in zip(TRELLIS_BITS, noisy, strict=True):
        searched = quantize_matrix("gptq", weight, Codec(bits, 32, "trellis"), factor)
        costs = [output_cost(weight, w, factor, "trellis") for w in (found, searched.dequantize())]
        assert costs[0] == pytest.approx(costs[1], rel=0.1)


@pytest.mark.skipif(cpu.missing() is not None, reason="needs the library")
@pytest.mark.parametrize("rows, columns", [(1, 32), (50, 160), (33, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rows_are_the_same_numbers(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    target, drawn = (torch.randn(columns, rows, generator=generator) for _ in range(2))
    scale = torch.rand(rows, generator=generator)
    found = noise_module._scaled_rows(target, drawn, scale, dtype)
    assert torch.equal(found, noise_module.plain_rows(target, drawn, scale, dtype))


@pytest.mark.parametrize("columns", [16, 256])
def test_feedback_in_16_bits_costs_the_same(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within .2 %; another draw changes these costs by 1 %."""
    monkeypatch.setattr(sweep_module, "COLUMNS_IN_16_BITS", columns)
    weight, factor = weight_and_factor(96, 320)
    weight = weight.bfloat16()
    noise = draw(weight.shape, 0, "x")
    found = noisy_weights(weight, TRELLIS_BITS, factor, noise)
    exact = noisy_weights(weight.float(), TRELLIS_BITS, factor, noise)
    for narrow, wide in zip(found, exact, strict=True):
        assert narrow.dtype == torch.bfloat16 and not narrow.equal(wide.bfloat16())
        costs = [output_cost(weight, w.bfloat16(), factor, "trellis") for w in (narrow, wide)]
        assert costs[0] == pytest.approx(costs[1], rel=2e-3)


def test_scales_fit_and_zero_rows_stay_zero() -> None:
    weight, factor = weight_and_factor(64, 64)
    weight[3] = 0
    (found,) = noisy_weights(weight, [1], factor, draw(weight.shape, 0, "x"))
    assert (found[3] == 0).all()
    root = factor.feedback * factor.curvature.sqrt()
    w, c = rotate(weight) @ root, rotate(found) @ root
    torch.testing.assert_close((w * c).sum(1), c.square().sum(1), rtol=1e-4, atol=1e-6)
    weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinity"):
        list(noisy_weights(weight, [1], factor, draw(weight.shape, 0, "x")))


# Scores


def noise_recipe(text_file: Path, **changes: object) -> Recipe:
    small = {"measure": "noise", "expert_bits": (1, 2, 4), "linear_bits": (2, 4, 8)}
    return small_recipe(text_file, "default", **(small | changes))


@pytest.fixture(scope="module")
def noise_scores(model_folder: Folder, text_file: Path) -> ExpertScores:
    return score(model_folder(), noise_recipe(text_file))


def test_costs_are_those_of_the_search(
    model_folder: Folder,
    text_file: Path,
    noise_scores: ExpertScores,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the tokens of the Hessians; on others they are larger (test_held_out.py)."""
    on_others = noise_scores
    for module in (noisy_expert, linear_costs):
        monkeypatch.setattr(module, "held_out", lambda *_: None)
    noise_scores = score(model_folder(), noise_recipe(text_file))
    assert (on_others.cost.sum(0)[:, :, 0] > noise_scores.cost.sum(0)[:, :, 0]).all()
    searched = score(model_folder(), noise_recipe(text_file, measure="gptq"))
    experts = noise_scores.cost.sum(0) / searched.cost.sum(0)  # [L, E, 3, B]
    assert (experts.mean((0, 1)) > 0.9).all() and (experts.mean((0, 1)) < 1.1).all()
    assert (experts > 0.7).all() and (experts < 1.4).all()
    attention = ["self_attn" in name for name in noise_scores.linears]
    both = (s.linear_cost[0, attention][:, :2] for s in (noise_scores, searched))
    linears = np.divide(*both)  # [M, 2 widths]
    assert (linears > 0.75).all() and (linears < 1.3).all()
    whole = noise_scores.linear_bits.index(8)  # scalar codes are rounded, not drawn
    assert np.array_equal(noise_scores.linear_cost[..., whole], searched.linear_cost[..., whole])


def test_nothing_is_searched_but_the_error_of_the_code(
    model_folder: Folder, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("a weight matrix was searched")

    monkeypatch.setattr(methods, "quantize_together", fails)
    score(model_folder(), noise_recipe(text_file))
    with pytest.raises(AssertionError, match="was searched"):
        score(model_folder(), noise_recipe(text_file, measure="gptq"))


def test_equal_runs_give_equal_bytes(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    threads: Callable[[int], None],
    noise_scores: ExpertScores,
) -> None:
    noise_scores.save(tmp_path / "first")
    for count in (1, 2):
        threads(count)
        score(model_folder(), noise_recipe(text_file)).save(tmp_path / "again")
        assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"damping": 0.5},
        {"hessian_weight": "none"},
        {"token_floor": 1000},
    ],
)
def test_every_choice_matters(
    changes: dict[str, object], model_folder: Folder, text_file: Path, noise_scores: ExpertScores
) -> None:
    changed = score(model_folder(), noise_recipe(text_file, **changes))
    assert (changed.cost != noise_scores.cost).any()


def test_experts_may_be_left_out(model_folder: Folder, text_file: Path) -> None:
    scores = score(model_folder(), noise_recipe(text_file, expert_bits=(0, 2)))
    searched = score(model_folder(), noise_recipe(text_file, expert_bits=(0, 2), measure="gptq"))
    assert np.array_equal(scores.cost[..., 0], searched.cost[..., 0])
    assert (scores.cost[..., 0] > scores.cost[..., 1]).all()


@pytest.mark.parametrize(
    ("family", "costs"), [("expert_codec", "cost"), ("linear_codec", "linear_cost")]
)
def test_scalar_codes_are_not_drawn(
    model_folder: Folder, text_file: Path, family: str, costs: str
) -> None:
    """Where codes are scalar, costs are those of gptq, to the bit."""
    recipe = noise_recipe(text_file, **{family: "int"})
    drawn, searched = (
        getattr(score(model_folder(), recipe.with_changes(measure=measure)), costs)
        for measure in ("noise", "gptq")
    )
    assert np.array_equal(drawn, searched)


def test_noise_measures_and_quantizes_not() -> None:
    with pytest.raises(InputError, match="quantizer is 'noise'"):
        Recipe().with_changes(quantizer="noise")


def test_default_draws() -> None:
    assert Recipe.load("default").measure == "noise"
    assert [Recipe.load(name).measure for name in ("fast", "paper")] == ["gptq", "rtn"]
