"""Neurons that tokens choose one by one (doge), against the dense product of their tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.costs.expert_costs import measure, rounded_weights
from moepress.costs.scores import ROUNDED
from moepress.costs.texts import Texts
from moepress.original.experts import ExpertWeights, RoutedExpert
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.recipe import Recipe
from moepress.rounding.expert import round_experts
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.options import Rounding
from moepress.rounding.tokens import hessian_tokens
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.original.test_walk import some_ids

Loaded = tuple[Walk, RoutedExpert]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A walk in front of a loaded layer, and the expert of all its neurons."""
    folder = save_model(make_model("doge"), tmp_path_factory.mktemp("doge"))
    source = Source(folder)
    walk = Walk(source, some_ids())
    with source.layer_loaded(0):
        yield walk, walk.expert(0, 0, walk.route(0))


def dense(expert: RoutedExpert, weights: ExpertWeights) -> Tensor:
    """Output [T, H] of all neurons, each times its routing weight, 0 if it is not chosen."""
    routed = expert.routed
    assert routed.neuron is not None
    of_neurons = torch.zeros(len(routed.hidden), len(weights.down))
    of_neurons.scatter_(1, routed.neuron, routed.weight)
    inner = expert.module.act_fn(routed.hidden @ weights.gate_up.T)
    return (inner * of_neurons) @ weights.down


@torch.inference_mode()
def test_outputs_and_errors_are_those_of_the_dense_product(loaded: Loaded, tmp_path: Path) -> None:
    walk, expert = loaded
    recipe = small_recipe(tmp_path, measure="rtn", expert_bits=(1, 3))
    rounding = Rounding.of_experts(recipe, recipe.measure)
    texts = Texts.of(some_ids(), [1.0])
    sums = walk.token_sums(expert.routed, [0])
    ((seen, offered),) = rounded_weights([expert], rounding, recipe.expert_bits)
    candidates: list[ExpertWeights] = []

    def kept(hidden: Tensor) -> Iterator[ExpertWeights]:
        assert hidden.shape == (len(expert.tokens), 1)
        for candidate in offered(hidden):
            assert candidate is not None
            candidates.append(candidate)
            yield candidate

    errors, _ = measure(expert, seen, kept, texts, sums)
    exact = dense(expert, expert.weights)
    torch.testing.assert_close(sums.result(), exact, rtol=1e-4, atol=1e-5 * exact.std().item())
    for option, candidate in enumerate(candidates):
        alone = (
            candidate._replace(down=expert.weights.down),
            candidate._replace(gate_up=expert.weights.gate_up),
            candidate,
        )
        for row, weights in zip(range(len(ROUNDED)), alone, strict=True):
            whole = (dense(expert, weights) - exact).square().sum().item()
            # The errors of a token's neurons are taken as independent: at most 5 % on this model.
            assert errors[row, option].item() == pytest.approx(whole, rel=0.1)


def test_a_token_counts_once(loaded: Loaded, tmp_path: Path) -> None:
    routed = loaded[1].routed
    tokens, weight = routed.statistics(1)
    assert tokens.tolist() == [len(routed.hidden)]
    assert weight.item() == pytest.approx(routed.weight.sum().item())
    policy = Rounding.of_experts(small_recipe(tmp_path), "gptq").tokens
    own, squares = hessian_tokens(routed, 0, 0, policy)
    assert torch.equal(own, torch.arange(len(routed.hidden)))
    torch.testing.assert_close(squares, routed.weight.square().sum(1))
    none = replace(routed, index=torch.ones_like(routed.index))  # no neuron is chosen
    assert none.statistics(1)[0].tolist() == [0]


@torch.inference_mode()
def test_the_second_table_is_rounded_to_nearest(loaded: Loaded, tmp_path: Path) -> None:
    """Whatever the quantizer: its Hessian is diagonal."""
    _, expert = loaded
    rounding = Rounding.of_experts(small_recipe(tmp_path), "gptq")
    ((first, second, _),) = round_experts([expert], rounding, [(2, 3)])
    tables = expert.weights.gate_up, expert.weights.down
    nearest = [
        quantize_matrix("rtn", w, rounding.codec(bits, 64))
        for w, bits in zip(tables, (2, 3), strict=True)
    ]
    assert torch.equal(second.dequantize(), nearest[1].dequantize())
    x = expert.routed.hidden
    squared = [((w.dequantize() - tables[0]) @ x.T).square().sum() for w in (first, nearest[0])]
    assert squared[0] < squared[1]


@torch.inference_mode()
def test_drawn_costs_are_near_those_of_the_search(tmp_path: Path) -> None:
    folder = save_model(make_model("doge"), tmp_path / "doge")
    source, ids, widths = Source(folder), some_ids(40, 32), (2, 3, 4)
    walk = Walk(source, ids)
    recipe = Recipe.load("default", bits=2.5)
    found = []
    with source.layer_loaded(0):
        expert = walk.expert(0, 0, walk.route(0))
        for how in ("noise", "gptq"):
            rounding = Rounding.of_experts(recipe, how)
            ((seen, offered),) = rounded_weights([expert], rounding, widths)
            sums = walk.token_sums(expert.routed, [0])
            found.append(measure(expert, seen, offered, Texts.of(ids, [1.0]), sums)[0])
    assert (found[0] / found[1] - 1).abs().max() < 0.3
