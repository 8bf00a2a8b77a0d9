"""Costs between measured widths: exact for the law they follow, near for drawn errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moepress.costs import interpolation
from moepress.costs.interpolation import POWER, Interpolation
from moepress.costs.scores import BOTH
from moepress.format.codec import TRELLIS_BITS
from moepress.score import score
from tests.conftest import small_recipe

ROWS = (192, 64)
OFFERED = (0, *TRELLIS_BITS)


def law(bits: float, rows: int, *_: object) -> float:
    """The error of a code at high rates, more for few rows."""
    return (1 + 4 / rows) * 4.0**-bits


@pytest.fixture
def without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolation, "code_error", law)


@pytest.mark.usefixtures("without_search")
def test_which_widths_are_measured() -> None:
    assert Interpolation.of_drawn(OFFERED, ROWS, "cpu").measured == (0, 1, 2, 4)
    assert Interpolation.of_drawn((2, 2.5, 3, 4), ROWS, "cpu").measured == (2, 3, 4)
    few = Interpolation.of_drawn((0, 1, 2, 4), ROWS, "cpu")
    costs = torch.rand(2, 3, 4)
    assert few.measured == (0, 1, 2, 4) and few.at_all(costs) is costs


@pytest.mark.usefixtures("without_search")
def test_costs_of_the_law() -> None:
    """log(cost / d), and that of both over their sum, are parabolas in d^(1/3): all are found."""
    few = Interpolation.of_drawn(OFFERED, ROWS, "cpu")
    d = torch.tensor([[1, *(law(bits, rows) for bits in TRELLIS_BITS)] for rows in ROWS])
    x = d.double() ** POWER
    gate_up, down = d.double() * torch.exp(torch.tensor([[-3.0], [2.0]]) + 0.4 * x - 0.9 * x**2)
    both = (gate_up + down) * torch.exp(0.02 - 0.1 * x[0] + 0.05 * x[0] ** 2)
    costs = torch.stack([gate_up, down, both])  # [3, B]
    costs[:, 0] = torch.tensor([7.0, 8.0, 9.0])  # left out
    texts = costs * torch.tensor([1.0, 1e-30])[:, None, None]
    options = [OFFERED.index(bits) for bits in few.measured]
    found = few.at_all(texts[..., options])
    torch.testing.assert_close(found, texts, rtol=1e-9, atol=0)
    assert torch.equal(found[..., options], texts[..., options])


@pytest.mark.usefixtures("without_search")
def test_costs_of_nothing_are_nothing() -> None:
    """A text without tokens of the expert, and one whose cost vanishes at a width."""
    few = Interpolation.of_drawn(OFFERED, ROWS, "cpu")
    costs = torch.ones(3, 3, 4, dtype=torch.float64)
    costs[0] = 0
    costs[1, BOTH, -1] = 0
    found = few.at_all(costs)
    assert (found[0] == 0).all() and torch.isfinite(found).all()
    assert (found[1, BOTH, 1:] == torch.tensor([1, 0, 1, 0, 0, 0, 0])).all()
    assert (found[2] > 0).all()


def test_costs_are_those_of_all_widths(
    model_folder: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights and few tokens: further off than on trained models, by 1.5 % in the mean."""
    offered = (0, 1, 2, 3, 4)
    recipe = small_recipe(text_file, "default", expert_bits=offered, linear_bits=(8,))
    found = score(model_folder(), recipe)
    monkeypatch.setattr(Interpolation, "of_drawn", lambda offered, *_: Interpolation.none(offered))
    exact = score(model_folder(), recipe)
    nodes = [0, 1, 2, 4]
    for name in ("cost", "squared_error"):
        ours, theirs = getattr(found, name), getattr(exact, name)
        assert np.array_equal(ours[..., nodes], theirs[..., nodes])
        assert not np.array_equal(ours, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0.03)
    ratio = found.cost.sum(0)[..., 3] / exact.cost.sum(0)[..., 3]
    np.testing.assert_allclose(ratio.mean((0, 1)), 1, rtol=0.02)
