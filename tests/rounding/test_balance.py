"""Experts with balanced channels: the same function, and a `down` that rounds better."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import moepress  # noqa: F401  # opens compressed folders
from moepress.allocate import allocate
from moepress.blocks.form import Form
from moepress.blocks.layout import Part
from moepress.costs.expert_costs import rounded_weights
from moepress.original.experts import ExpertWeights, Routed, RoutedExpert, expert_hidden
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.quantize import quantize
from moepress.recipe import NAMED, Recipe
from moepress.rounding.balance import (
    balanced,
    can_balance,
    channel_scales,
    experts_to_round,
)
from moepress.rounding.expert import GateUp, round_downs
from moepress.rounding.options import Rounding
from moepress.score import score
from tests.conftest import small_recipe
from tests.uneven import with_uneven_channels

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


def expert(spread: float = 0.0, gate: Any = swiglu, **more: Any) -> RoutedExpert:
    """An expert, scaled unevenly.

    Args:
        spread: of the logarithm of the scales of its channels.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gate_up, down = random(2 * INNER, H) / H**0.5, random(H, INNER) / INNER**0.5
    scale = torch.exp(spread * random(INNER))
    gate_up[INNER:] /= scale[:, None]
    routed = Routed(random(T, H), torch.zeros(T, 1, dtype=torch.int64), torch.rand(T, 1), **more)
    weights = ExpertWeights(gate_up, down * scale)
    return RoutedExpert(0, 0, SimpleNamespace(_apply_gate=gate), weights, routed)


def hidden(one: RoutedExpert) -> Tensor:
    return expert_hidden(one.module, one.weights.gate_up, one.routed.hidden)


def outputs(one: RoutedExpert) -> Tensor:
    return hidden(one) @ one.weights.down.T


def test_the_function_stays() -> None:
    before, after = expert(1), balanced(expert(1))
    assert not torch.equal(after.weights.down, before.weights.down)
    assert torch.equal(after.weights.gate_up[:INNER], before.weights.gate_up[:INNER])
    torch.testing.assert_close(outputs(after), outputs(before), rtol=1e-4, atol=1e-4)


def test_rows_and_columns_have_equal_norms() -> None:
    rows = torch.tensor([1.0, 16.0, 4.0, 0.0, 2.0])
    columns = torch.tensor([1.0, 4.0, 9.0, 3.0, 0.0])
    scale = channel_scales(rows, columns)
    quotient = rows[:3] / scale[:3] / (columns * scale)[:3]
    torch.testing.assert_close(quotient, quotient[:1].expand(3))
    torch.testing.assert_close((columns * scale)[:3].norm(), columns[:3].norm())
    assert scale[3] == scale[4] == 1  # padding, for instance
    assert torch.equal(channel_scales(0 * rows, columns), torch.ones(5))


def test_it_does_not_matter_how_channels_were_scaled() -> None:
    found, wanted = (balanced(expert(spread)).weights for spread in (2.0, 0.0))
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
    ("measured", "rounding"),
    [(error_of_down, DEFAULT), (drawn_error_of_down, DEFAULT), (error_of_down, SCALAR)],
)
def test_rounding_loses_as_little_as_of_an_even_expert(measured: Any, rounding: Rounding) -> None:
    even, uneven = measured(expert(), rounding), measured(expert(1), rounding)
    found = measured(balanced(expert(1)), rounding)
    assert uneven > 1.5 * even
    assert found == pytest.approx(even, rel=0.05)


FORM = Form(1, H, INNER, Part(("gate_up",)), Part(("down",)))


@pytest.mark.parametrize(
    ("form", "gate", "may"),
    [
        (FORM, swiglu, True),
        (FORM, limited, False),
        (FORM, offset, False),
        (replace(FORM, gate_up=Part(("gate_up",), bias="gate_up_bias")), swiglu, False),
        (replace(FORM, gated=False), swiglu, False),
        (replace(FORM, by_neuron=True), swiglu, False),
    ],
)
def test_experts_that_it_would_change_cannot_be_balanced(form: Form, gate: Any, may: bool) -> None:
    assert can_balance(form, SimpleNamespace(_apply_gate=gate), torch.device("cpu")) == may


def test_experts_are_balanced_on_their_way_and_not_held(model_folder: Callable[..., Path]) -> None:
    walk = Walk(Source(model_folder()), torch.arange(64)[None])
    with walk.source.layer_loaded(0), torch.inference_mode():
        routed = walk.route(0)
        plain = walk.experts(0, [0, 1], routed)
        found = experts_to_round(walk, 0, [0, 1], routed, DEFAULT)
        off = experts_to_round(walk, 0, [0, 1], routed, replace(DEFAULT, balance=False))
        first = next(plain)
        assert torch.equal(next(found).weights.down, balanced(first).weights.down)
        assert torch.equal(next(off).weights.down, first.weights.down)
        gone = weakref.ref(first)
        del first
        assert gone() is None
        assert [[one.number for one in rest] for rest in (plain, found, off)] == [[1]] * 3


def test_a_model_is_compressed_alike_however_its_channels_are_scaled(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    even, uneven = model_folder(), with_uneven_channels(model_folder(), tmp_path / "uneven")
    ids = torch.arange(40, 80)[None]
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(even)(ids).logits

        def measured(folder: Path, balance: bool) -> tuple[Any, float]:
            recipe = small_recipe(text_file, expert_bits=(2,), bits=2, balance=balance)
            scores = score(folder, recipe)
            out = tmp_path / f"{folder.name}-{balance}"
            quantize(folder, allocate(scores, recipe), out)
            logits = AutoModelForCausalLM.from_pretrained(out)(ids).logits
            return scores.cost.sum(), float((logits - exact).square().mean())

        wanted, found = measured(even, True), measured(uneven, True)
        without = measured(uneven, False)
    assert found == pytest.approx(wanted, rel=0.1)
    assert without[0] > 1.3 * wanted[0]


def test_the_papers_recipes_do_not_balance() -> None:
    assert {name for name, recipe in NAMED.items() if recipe.balance} == {"default", "fast"}
