"""A few tokens of far larger inputs count as much as a token of LARGEST times the usual size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moepress.compress import compress
from moepress.format.checkpoint import shard_name
from moepress.recipe import Recipe
from moepress.rounding import massive
from moepress.rounding.inputs import Inputs
from moepress.rounding.massive import LARGEST, bounded
from moepress.rounding.options import Rounding
from tests.conftest import small_recipe

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
        found.add(x, x + 0.1 * inputs(4) if corrects else None, bounded(x, torch.ones(T)))
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


def test_the_hessian_of_the_paper_counts_all_in_full() -> None:
    x, weight = inputs(), torch.rand(T)
    x[7] *= 1000
    for linears in (Rounding.of_experts, Rounding.of_linears):
        assert torch.equal(linears(Recipe(), "gptq").token_weights(x, weight), bounded(x, weight))
        plain = linears(Recipe(hessian_weight="none"), "gptq")
        assert plain.token_weights(x, weight) is weight
        assert plain.token_weights(x) is None


def test_experts_and_linears_bound_their_tokens(
    model_folder: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny limit tokens weigh by the inverse of their size, and codes change.

    But for inputs right behind a norm: all have the same size here.
    """
    folder, recipe = model_folder("mixtral"), small_recipe(text_file)
    packed = []
    for limit in (LARGEST, 1e-3):
        monkeypatch.setattr(massive, "LARGEST", limit)
        out = compress(folder, folder.parent / f"out-{limit}", recipe, bits=2.5)
        packed.append(load_file(out / shard_name(0)))
    uneven = [name for name in packed[0] if "o_proj" in name or "down" in name]
    assert len(uneven) >= 2
    for name in uneven:
        assert not torch.equal(packed[0][name], packed[1][name]), name
