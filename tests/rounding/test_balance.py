"""Experts with balanced channels: the same function, and a `down` that rounds better."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.costs.expert_costs import rounded_weights
from moepress.original.experts import ExpertWeights, Routed, RoutedExpert, expert_hidden
from moepress.recipe import NAMED, Recipe
from moepress.rounding.balance import EXPONENT, WEAKEST, balanced, channel_scales
from moepress.rounding.expert import GateUp, round_downs
from moepress.rounding.options import Rounding

H, INNER, T = 64, 128, 700
DEFAULT = Rounding.of_experts(Recipe(), "gptq")
SCALAR = Rounding.of_experts(NAMED["fast"], "gptq")


def swiglu(products: Tensor) -> Tensor:
    gate, up = products.chunk(2, -1)
    return F.silu(gate) * up


def limited(products: Tensor) -> Tensor:
    gate, up = products.chunk(2, -1)
    return F.silu(gate) * up.clamp(-7, 7)


def offset(products: Tensor) -> Tensor:
    gate, up = products.chunk(2, -1)
    return F.silu(gate) * (up + 1)


def expert(spread: float = 2.0, gate: Any = swiglu, **more: Any) -> RoutedExpert:
    """An expert of which some channels are much stronger than others.

    Args:
        spread: of the logarithm of what channels contribute to the output.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gate_up = random(2 * INNER, H) / H**0.5
    gate_up[INNER:] *= torch.exp(spread / 2 * random(INNER))[:, None]
    weights = ExpertWeights(gate_up, random(H, INNER) / INNER**0.5)
    routed = Routed(random(T, H), torch.zeros(T, 1, dtype=torch.int64), torch.rand(T, 1), **more)
    return RoutedExpert(0, 0, SimpleNamespace(_apply_gate=gate), weights, routed)


def hidden(one: RoutedExpert) -> Tensor:
    return expert_hidden(one.module, one.weights.gate_up, one.routed.hidden)


def outputs(one: RoutedExpert) -> Tensor:
    return hidden(one) @ one.weights.down.T


def test_the_function_stays() -> None:
    before, after = expert(), balanced(expert(), DEFAULT)
    assert not torch.equal(after.weights.down, before.weights.down)
    assert torch.equal(after.weights.gate_up[:INNER], before.weights.gate_up[:INNER])
    torch.testing.assert_close(outputs(after), outputs(before), rtol=1e-4, atol=1e-4)


def test_columns_have_the_energies_that_are_wanted() -> None:
    strengths = torch.tensor([1.0, 16.0, 81.0, 0.0, 1e-9, 5.0], dtype=torch.float64)
    energies = torch.tensor([1.0, 4.0, 1.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    scale = channel_scales(strengths, energies)
    after = scale.square() * energies
    assert float(after.sum()) == pytest.approx(float(energies.sum()) + 3 * (float(scale[3]) - 1))
    assert float(after[1] / after[0]) == pytest.approx(64**EXPONENT)
    assert float(after[2] / after[0]) == pytest.approx(81**EXPONENT)
    weakest = WEAKEST * (1 + 64 + 81 + 1e-9) / 4
    assert float(after[4] / after[0]) == pytest.approx(weakest**EXPONENT)
    assert scale[3] == scale[5] == 1  # never used, or without weights
    for unknown in (0.0, torch.nan, torch.inf):
        assert torch.equal(channel_scales(unknown * strengths, energies), torch.ones_like(scale))


def test_it_does_not_matter_how_channels_were_scaled() -> None:
    one = expert()
    scale = torch.exp(2 * torch.randn(INNER, generator=torch.Generator().manual_seed(1)))
    gate_up = one.weights.gate_up.clone()
    gate_up[INNER:] /= scale[:, None]
    other = one.with_weights(ExpertWeights(gate_up, one.weights.down * scale))
    found, wanted = (balanced(each, DEFAULT).weights for each in (other, one))
    common = found.down.norm() / wanted.down.norm()  # the mean energy of `down` stays
    torch.testing.assert_close(found.down, common * wanted.down, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(
        common * found.gate_up[INNER:], wanted.gate_up[INNER:], rtol=0.02, atol=1e-6
    )


def error_of_down(one: RoutedExpert, rounding: Rounding) -> float:
    """Of the outputs, with `down` rounded to 2 bits."""
    ((down,),) = round_downs([one], [GateUp(one.weights.gate_up)], rounding, [(2,)])
    return float((hidden(one) @ down.dequantize().T - outputs(one)).square().mean())


def drawn_error_of_down(one: RoutedExpert, rounding: Rounding) -> float:
    """The same of a sketch of `down` with drawn errors."""
    ((seen, offered),) = rounded_weights([one], replace(rounding, quantizer="noise"), (2,))
    (candidate,) = offered(hidden(one))
    assert candidate is not None
    return float((hidden(one) @ (candidate.down - seen.weights.down).T).square().mean())


@pytest.mark.parametrize(
    ("measured", "rounding", "most"),
    [
        (error_of_down, DEFAULT, 0.6),
        (drawn_error_of_down, DEFAULT, 0.6),
        (error_of_down, SCALAR, 0.8),
    ],
)
def test_rounding_down_costs_less(measured: Any, rounding: Rounding, most: float) -> None:
    one = expert(spread=3)
    quotient = measured(balanced(one, rounding), rounding) / measured(one, rounding)
    assert quotient < most


def test_experts_that_it_would_change_stay() -> None:
    for gate in (limited, offset):
        one = expert(gate=gate)
        assert balanced(one, DEFAULT) is one
    one = expert()
    biased = one.with_weights(one.weights._replace(gate_up_bias=torch.zeros(2 * INNER)))
    single = one.with_weights(one.weights._replace(gate_up=one.weights.gate_up[:INNER]))
    neuron = expert(neuron=torch.zeros(T, 1, dtype=torch.int64))
    for other in (biased, single, neuron):
        assert balanced(other, DEFAULT) is other
    for how in (replace(DEFAULT, balance=False), replace(DEFAULT, quantizer="rtn")):
        assert balanced(one, how) is one


def test_the_papers_recipes_do_not_balance() -> None:
    assert {name for name, recipe in NAMED.items() if recipe.balance} == {"default", "fast"}
