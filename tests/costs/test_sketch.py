"""Sketches of experts: random sums of their outputs, and costs near those of the whole outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moepress.costs import sketch
from moepress.costs.sketch import rows_in_sketch, sketched
from moepress.original.experts import ExpertWeights, Routed, RoutedExpert
from moepress.score import score
from tests.conftest import small_recipe

HIDDEN, INNER = 64, 24


def expert(layer: int = 0, number: int = 0, **module: object) -> RoutedExpert:
    generator = torch.Generator().manual_seed(number)
    down = torch.randn(HIDDEN, INNER, generator=generator)
    weights = ExpertWeights(torch.zeros(2 * INNER, HIDDEN), down, None, down[:, 0].clone())
    routed = Routed(torch.zeros(1, HIDDEN), torch.zeros(1, 1).long(), torch.ones(1, 1))
    return RoutedExpert(layer, number, SimpleNamespace(**module), weights, routed)


def test_rows_are_sums_with_random_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "ROWS", 16)
    experts = [expert(number=number) for number in range(3)]
    rows, sums = (
        torch.cat([one.weights.down for one in some], 1)  # [64 or 16, 3 * 24]
        for some in (experts, [sketched(one, 0) for one in experts])
    )
    signs = torch.linalg.lstsq(rows.T, sums.T).solution  # the same of all three experts
    torch.testing.assert_close(signs.abs(), torch.full((HIDDEN, 16), 0.25), rtol=1e-3, atol=1e-3)
    assert abs(signs.sign().mean()) < 0.1  # of 1024: three standard deviations
    one = experts[0]
    found = sketched(one, 0).weights
    torch.testing.assert_close(found.down_bias, found.down[:, 0])
    assert torch.equal(found.gate_up, one.weights.gate_up)
    assert torch.equal(found.down, sketched(one, 0).weights.down)
    for changed in (sketched(one, 1), sketched(replace(one, layer=1), 0)):
        assert not torch.equal(found.down, changed.weights.down)


def test_what_has_no_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [rows_in_sketch(hidden) for hidden in (2047, 2048, 7168)] == [2047, 1024, 1024]
    assert sketched(one := expert(), 0) is one
    monkeypatch.setattr(sketch, "ROWS", 16)
    assert sketched(one := expert(has_post_expert_norm=True), 0) is one


def test_costs_are_near_and_outputs_exact(
    model_folder: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(text_file, "default", expert_bits=(0, 1, 2, 4), linear_bits=(8,))
    exact = score(model_folder(), recipe)
    monkeypatch.setattr(sketch, "ROWS", 16)
    found = score(model_folder(), recipe)
    assert np.array_equal(found.output_energy, exact.output_energy)
    assert np.array_equal(found.residual_energy, exact.residual_energy)
    ratio = found.cost.sum(0) / exact.cost.sum(0)  # [L, E, 3, B]
    assert (ratio != 1).all() and (ratio > 0.4).all() and (ratio < 2).all()
    np.testing.assert_allclose(ratio.mean((0, 1)), 1, atol=0.25)
    np.testing.assert_allclose(ratio.mean(), 1, atol=0.1)
    assert np.std(ratio[..., 3] / ratio[..., 1]) < 0.2  # of two widths: the same random numbers
