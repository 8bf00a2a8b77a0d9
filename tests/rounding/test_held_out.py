"""Errors on tokens that a Hessian has not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.costs.scores import BOTH
from moepress.rounding.factor import PROBES
from moepress.rounding.held_out import held_out
from moepress.rounding.hessian import Hessian
from moepress.rounding.inputs import RIDGE, Inputs
from moepress.rounding.noise import draw, noisy_weights
from moepress.rounding.token_factor import factor_of_tokens
from moepress.rounding.tokens import BORROWED_WEIGHT
from moepress.score import score
from tests.conftest import small_recipe


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Tokens [T, K] whose columns have a spectrum that falls as one over the rank, and noise."""
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    directions = torch.linalg.qr(mixing).Q / torch.arange(1, columns + 1).sqrt()[:, None]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator) @ directions


def by_regression(x: Tensor, added: float) -> tuple[Tensor, Tensor]:
    """||u_k||^2 of each column, and what it takes of the trace of what is left: one by one."""
    tokens, columns = x.shape
    x = x.double()
    energy, fitted = torch.empty(columns), torch.empty(columns)
    for k in range(columns):
        left = []
        for first in (k + 1, k):  # without the column, and with it
            behind = x[:, first:]
            ridge = behind.T @ behind + added * torch.eye(columns - first)
            left.append(torch.eye(tokens) - behind @ torch.linalg.solve(ridge, behind.T))
        energy[k] = (left[0] @ x[:, k]).square().sum()
        fitted[k] = left[0].trace() - left[1].trace()
    return energy, fitted


@pytest.mark.parametrize("tokens", [20, 200])
def test_degrees_of_freedom_are_those_of_regressions(tokens: int) -> None:
    x = correlated(tokens, 48, 0)
    added = 0.05 * x.square().sum(0).mean().item()
    energy, fitted = by_regression(x, added)
    hessian = Hessian(48, "cpu")
    hessian.add(x)
    for factor in (hessian.factor(0.05), factor_of_tokens(x, 0.05)):
        assert torch.allclose(factor.fitted(), fitted, atol=2e-4)
        assert torch.allclose(factor.fitted() * factor.curvature, energy, rtol=2e-3)
    total = torch.linalg.eigvalsh(x @ x.T).clamp(min=0)
    assert fitted.sum() == pytest.approx((total / (total + added)).sum().item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [150, 1000])
def test_many_columns_are_measured_by_random_vectors(tokens: int) -> None:
    columns = 4 * PROBES
    x = correlated(tokens, columns, 0)
    hessian = Hessian(columns, "cpu")
    hessian.add(x)
    estimated, exact = hessian.copy().factor(0.02), factor_of_tokens(x, 0.02)
    sums = [factor.fitted().flip(0).cumsum(0) for factor in (estimated, exact)]
    assert (sums[0] - sums[1]).abs().max() < 0.02 * sums[1].max()
    damping = RIDGE * columns / tokens  # the least for trellis codes
    estimated, exact = hessian.factor(damping), factor_of_tokens(x, damping)
    ratios = [held_out(factor, torch.ones(tokens)) for factor in (estimated, exact)]
    assert torch.allclose(*ratios, rtol=0.03)


@pytest.mark.parametrize("tokens", [128, 256, 1024])
def test_errors_on_other_tokens(tokens: int) -> None:
    """Draw the errors for a Hessian, and compare them there and on many other tokens."""
    columns, rows = 256, 512
    x, others = correlated(tokens, columns, 0), correlated(20_000, columns, 1)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    inputs = Inputs(columns, "cpu", "trellis", corrects=False, tokens=tokens)
    inputs.add(x, None)
    assert inputs.tokens == tokens
    factor = inputs.factor(0.01)
    ratio = held_out(factor, inputs.weights)
    noise = draw(weight.shape, 0, "x")
    (noisy,) = noisy_weights(weight, [2], factor, noise)
    seen, new = ((x @ (noisy - weight).T).square().mean() for x in (x, others))
    assert new / seen > 1.05
    assert ratio.square().item() == pytest.approx((new / seen).item(), rel=0.15)
    (larger,) = noisy_weights(weight, [2], factor, noise, larger=ratio)
    assert torch.allclose(larger - weight, ratio * (noisy - weight), atol=1e-4)


def seen_and_new(weights: Tensor, own: int | None = None) -> tuple[float, float]:
    """How much larger errors are on other tokens than on those of a Hessian: predicted, and drawn.

    Args:
        weights: of its tokens.
        own: how many of them, the first, errors are compared on; None: all.
    """
    tokens, columns = len(weights), 256
    x, others = correlated(tokens, columns, 0), correlated(20_000, columns, 1)
    weight = torch.randn(512, columns, generator=torch.Generator().manual_seed(2))
    inputs = Inputs(columns, "cpu", "trellis", corrects=False, tokens=tokens)
    inputs.add(x, None, weights)
    factor = inputs.factor(0.01)
    (noisy,) = noisy_weights(weight, [2], factor, draw(weight.shape, 0, "x"))
    on_these, on_others = ((y @ (noisy - weight).T).square().mean(1) for y in (x, others))
    seen = (on_these * weights)[:own].sum() / weights[:own].sum()
    predicted = held_out(factor, inputs.weights, own).square().item()
    return predicted, (on_others.mean() / seen).item()


@pytest.mark.parametrize("spread", [0.5, 1, 2])
@pytest.mark.parametrize("tokens", [48, 128, 512])
def test_errors_on_other_tokens_where_weights_are_uneven(tokens: int, spread: float) -> None:
    """As the squares of routing weights are: few tokens have most of the weight."""
    generator = torch.Generator().manual_seed(5)
    predicted, drawn = seen_and_new((spread * torch.randn(tokens, generator=generator)).exp())
    assert predicted == pytest.approx(drawn, rel=0.2)


@pytest.mark.parametrize("own", [10, 60, 150])
def test_errors_are_compared_on_the_expert_s_own_tokens(own: int) -> None:
    """Borrowed tokens have little weight, so they are fitted less than the expert's own."""
    weights = torch.full((160,), BORROWED_WEIGHT)
    weights[:own] = 1
    predicted, drawn = seen_and_new(weights, own)
    assert predicted == pytest.approx(drawn, rel=0.25)
    assert seen_and_new(weights)[0] < predicted


def test_few_tokens_do_not_make_rounding_dearer_than_leaving_an_expert_out(
    model_folder: Callable[..., Path], text_file: Path
) -> None:
    recipe = small_recipe(text_file, "default", expert_bits=(0, 1, 2), sequences=2)
    scores = score(model_folder("qwen2_moe"), recipe)
    left_out, _, two_bits = scores.cost.sum(0)[scores.tokens > 0][:, BOTH].T
    assert (two_bits < 0.6 * left_out).all()


def test_without_tokens_nothing_is_larger() -> None:
    inputs = Inputs(32, "cpu", "trellis", corrects=False)
    assert held_out(inputs.factor(0.01), inputs.weights) == 1
