"""A few tokens of far larger inputs count as much as a token of LARGEST times the usual size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moepress.rounding.inputs import Inputs
from moepress.rounding.massive import LARGEST, bounded

T, K = 300, 32


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_inputs_count_in_full(dtype: torch.dtype) -> None:
    x = inputs().to(dtype)
    weight = torch.rand(T)
    assert torch.equal(bounded(x, None), torch.ones(T))
    assert torch.equal(bounded(x, weight), weight)
    x[5] = 0
    assert torch.equal(bounded(x, weight), weight)


def test_massive_inputs_count_as_if_they_were_smaller() -> None:
    x, weight = inputs(), torch.rand(T)
    usual = x.norm(dim=1).median()
    x[7] *= 1000
    found = bounded(x, weight)
    assert found[7] * x[7].square().sum() == pytest.approx(
        weight[7].item() * (LARGEST * usual).square().item(), rel=0.02
    )
    assert torch.equal(found[:7], weight[:7])
    assert torch.equal(found[8:], weight[8:])


@pytest.mark.parametrize("x", [torch.zeros(3, K), torch.zeros(0, K), torch.full((3, K), torch.inf)])
def test_inputs_without_a_size(x: Tensor) -> None:
    assert bounded(x, torch.ones(len(x))).shape == (len(x),)


@pytest.mark.parametrize("tokens", [None, T])
@pytest.mark.parametrize("corrects", [False, True])
def test_a_massive_token_does_not_hide_the_others(tokens: int | None, corrects: bool) -> None:
    """Factor, targets and weights are about those of the same inputs without that token."""
    weight = torch.randn(8, K, generator=torch.Generator().manual_seed(3))

    def gathered(x: Tensor) -> tuple[Tensor, Tensor, float]:
        found = Inputs(K, "cpu", "trellis", corrects, weight, tokens)
        found.add(x, x + 0.1 * inputs(4) if corrects else None, torch.ones(T))
        target = found.corrected(weight, 0.01, 1.0)
        return target, found.factor(0.01).curvature, found.tokens

    plain = inputs()
    massive = plain.clone()
    massive[7] *= 1e4
    without = plain.clone()
    without[7] = 0
    for found, expected in zip(gathered(massive)[:2], gathered(without)[:2], strict=True):
        assert (
            torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9
        )
    assert T - 2 < gathered(massive)[2] <= T
