"""Channels between two linears are balanced, where the layer then computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.rounding.balanced_linears import Pair, balance_linears, find_pairs
from moepress.rounding.same_layer import watch
from moepress.score import score
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.uneven import with_uneven_channels

ATTENTION = "model.layers.0.self_attn."
VALUES, OUTPUT = f"{ATTENTION}v_proj.weight", f"{ATTENTION}o_proj.weight"
IDS = torch.arange(40, 120).view(2, 40)


def names(walk: Walk, layer: int, packed: list[str] | None = None) -> set[tuple[str, str]]:
    linears = walk.source.packable[layer].keys() if packed is None else packed
    with walk.source.layer_loaded(layer):
        found = find_pairs(walk, layer, linears, watch(walk, layer))
    return {(pair.first.split(".")[-2], pair.second.split(".")[-2]) for pair in found}


def norms(walk: Walk, pair: Pair) -> tuple[Tensor, Tensor]:
    first, second = (walk.source.current(name) for name in (pair.first, pair.second))
    return first.square().sum(1).sqrt(), pair.of_rows(second.square().sum(0)).sqrt()


def test_values_and_output_of_shared_heads_are_balanced(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    found = {}
    for name in ("even", "uneven"):
        plain = model_folder()
        folder = plain if name == "even" else with_uneven_channels(plain, tmp_path / name)
        walk = Walk(Source(folder), IDS)
        with walk.source.layer_loaded(0):
            (pair,) = find_pairs(walk, 0, [VALUES, OUTPUT], watch(walk, 0))
            assert (pair.first, pair.second, pair.repeats) == (VALUES, OUTPUT, 2)
            balance_linears(walk.source, [pair])
            rows, columns = norms(walk, pair)
            found[name] = walk.source.current(VALUES), walk.source.current(OUTPUT)
        quotients = rows / columns
        torch.testing.assert_close(quotients, quotients.mean().expand_as(rows), rtol=0.02, atol=0)
    for even, uneven in zip(found["even"], found["uneven"], strict=True):
        ratio = float(even.norm() / uneven.norm())
        torch.testing.assert_close(uneven * ratio, even, rtol=0.02, atol=1e-6)


def test_only_rounded_pairs_are_balanced(model_folder: Callable[..., Path]) -> None:
    walk = Walk(Source(model_folder()), IDS)
    assert names(walk, 0) == {("v_proj", "o_proj")}
    assert names(walk, 0, [VALUES]) == names(walk, 0, [OUTPUT]) == set()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("deepseek_v3", {"up_proj"}),  # its values have no linear of their own
        ("gpt_oss", {"v_proj"}),  # with biases
        ("glm5_next", set()),  # limits of up
        ("gemma4_text", {"up_proj"}),  # a norm of the values
    ],
)
def test_what_lies_between_is_asked(family: str, expected: set[str], tmp_path: Path) -> None:
    walk = Walk(Source(save_model(make_model(family), tmp_path / family)), IDS)
    assert {first for first, _ in names(walk, 0)} == expected


def test_values_that_are_used_again_are_left_alone(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[..., tuple[Tensor, Any]] = MixtralAttention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = plain(self, hidden_states, *args, **kwargs)
        return out + 0.01 * self.v_proj(hidden_states).mean(-1, keepdim=True), weights

    monkeypatch.setattr(MixtralAttention, "forward", forward)
    assert names(Walk(Source(model_folder()), IDS), 0) == set()


def test_values_that_are_almost_zero_leave_the_others_as_sensitive(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """Gradients at the outputs of a linear are as large as its columns, and these stay in sum."""
    folder = shutil.copytree(model_folder(), tmp_path / "pruned")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("v_proj.weight")]:
        tensors[name][::8] *= 2.0**-12
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    costs = {}
    for balance in (False, True):
        recipe = small_recipe(text_file, "default", balance=balance)
        scores = score(folder, recipe)
        row = scores.linears.index(VALUES)
        costs[balance] = scores.linear_cost[:, row, 0].sum()
    assert costs[True] == pytest.approx(costs[False], rel=0.5)
