"""Linears that read the routed experts' outputs are scored and rounded on these outputs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moepress
from moepress.compress import compress
from moepress.original.architectures import reads_experts
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.recipe import Recipe
from moepress.rounding.linear import linear_inputs
from moepress.rounding.options import Rounding
from tests.conftest import small_recipe
from tests.families.models import make_model, open_model, save_model
from tests.families.state import FAMILIES
from tests.original.test_walk import some_ids

quantizing = importlib.import_module("moepress.quantize")  # not the function of that name
scoring = importlib.import_module("moepress.score")
NAME = "model.layers.1.mixer.fc2_latent_proj.weight"


@contextmanager
def inputs_of(model: nn.Module, weight: str) -> Iterator[list[Tensor]]:
    """The inputs of a linear in each call, as rows."""
    seen: list[Tensor] = []
    module = model.get_submodule(weight.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    yield seen
    hook.remove()


@pytest.mark.families
@pytest.mark.parametrize("family", [*FAMILIES, "latent"])
def test_no_other_linear_reads_them(family: str, folder: Path, tmp_path: Path) -> None:
    """Others would be measured with experts that return zeros."""
    source = Source(folder if family == "latent" else save_model(make_model(family), tmp_path))
    walk, found = Walk(source, some_ids(2)), set()
    for layer in range(len(source.layers)):
        with source.layer_loaded(layer), torch.inference_mode():
            for name in source.packable[layer] if layer in source.experts else ():
                with inputs_of(source.model, name) as seen:
                    walk.run_for_hooks(layer)
                    zeros = seen.copy()
                    tokens, hidden = walk.states.shape[:2].numel(), source.experts[layer].hidden
                    walk.run_for_hooks(layer, experts_output=torch.ones(tokens, hidden))
                if not all(map(torch.equal, zeros, seen[len(zeros) :])):
                    found.add(name)
            walk.pass_layer(layer)
    expected = {name for linears in source.packable for name in linears if reads_experts(name)}
    assert found == expected
    assert bool(found) == (family in ("latent", "muse_spark"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    model = make_model("nemotron_h", moe_latent_size=32)
    return save_model(model, tmp_path_factory.mktemp("latent"), tokenizer_folder)


def test_the_hessian_is_of_the_experts_outputs(folder: Path) -> None:
    source, ids = Source(folder), some_ids()
    walk = Walk(source, ids)
    with source.layer_loaded(0):
        walk.pass_layer(0)
    with source.layer_loaded(1), torch.inference_mode():
        output = walk.experts_output(1, walk.route(1))
        modules = {NAME: source.module(NAME)}
        rounding = Rounding.of_linears(Recipe(linear_codec="int"), "gptq")
        ((names, inputs),) = linear_inputs(walk, 1, modules, rounding, experts_output=output)
        factor = inputs.factor(0.01)
    model = open_model("nemotron_h", folder)
    with inputs_of(model, NAME) as seen, torch.no_grad():
        model(ids)
    (x,) = seen
    expected = x.T.double() @ x.double()
    expected.diagonal().add_(0.01 * expected.diagonal().mean())
    found = (factor.dense() * factor.curvature).double() @ factor.dense().T.double()
    assert names == (NAME,) and float(x.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("recipe", ["fast", "default"])
def test_they_are_scored_and_rounded_after_the_experts(
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    costs: list[Tensor] = []
    given: list[tuple[Tensor, Tensor]] = []  # tokens, and the experts' outputs

    def scored(*args: Any, **kwargs: Any) -> Tensor:
        found = real_score(*args, **kwargs)
        if kwargs and NAME in args[2]:
            costs.append(found[list(args[2]).index(NAME)])
        return found

    def gathered(*args: Any, **kwargs: Any) -> Any:
        if NAME in args[2]:
            given.append((args[0].ids, kwargs["experts_output"].clone()))
        return real_inputs(*args, **kwargs)

    real_score, real_inputs = scoring.score_linears, quantizing.linear_inputs
    monkeypatch.setattr(scoring, "score_linears", scored)
    monkeypatch.setattr(quantizing, "linear_inputs", gathered)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, recipe, bits=2.5))
    assert "its cost is unknown" not in caplog.text
    assert len(costs) == (recipe == "default")  # "fast" does not choose widths of linears
    for cost in costs:
        assert torch.isfinite(cost).all() and bool((cost.diff() < 0).all())  # wider is better
    model = open_model("nemotron_h", moepress.dequantize(out, tmp_path / "plain"))
    ((ids, output),) = given
    with inputs_of(model, NAME) as seen, torch.no_grad():
        model(ids)
    (x,) = seen
    # The walk has the embedding before it is rounded to 8 bits.
    assert (output - x).norm() < 0.1 * x.norm()
