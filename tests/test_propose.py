"""Proposals: what each budget costs, and what fits."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.allocate import allocate
from moepress.allocation.budget import budget_range
from moepress.cli.tables import proposal_table
from moepress.compress import compress
from moepress.errors import InputError
from moepress.format.checkpoint import SCORES, WORK
from moepress.propose import SHARE, memory, proposal, propose
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.score import score
from moepress.writing.held import LOCK
from tests import synthetic
from tests.conftest import small_recipe

Folder = Callable[..., Path]


@pytest.mark.parametrize("cost", ["error", "paper", "uniform"])
def test_plans_are_those_of_allocate(cost: str) -> None:
    scores = synthetic.scores(3, 8)
    recipe = Recipe.load("fast", expert_bits=(1, 2, 3), cost=cost)
    found = proposal(scores, recipe, {})
    low, high = budget_range(scores, recipe).bits
    assert (found.plans[0].average_bits, found.plans[-1].average_bits) == (low, high)
    assert len(found.plans) == (3 if cost == "uniform" else 9)
    for plan in found.plans:
        same = allocate(scores, recipe.with_changes(bits=plan.average_bits))
        assert plan.predicted_loss == pytest.approx(same.predicted_loss)


def test_the_best_fits_and_nothing_better_does() -> None:
    scores = synthetic.scores(3, 8)
    recipe = Recipe.from_dict(scores.recipe | {"bits": None})
    low, high = budget_range(scores, recipe).size
    memory = {
        "small": int(low / SHARE) - 2,
        "middle": int((low + high) / 2 / SHARE),
        "large": 10**15,
    }
    found = proposal(scores, recipe, memory)
    assert found.best["small"] is None
    assert found.best["large"].folder_bytes == high
    middle = found.best["middle"]
    assert middle.folder_bytes <= SHARE * memory["middle"]
    same = allocate(scores, recipe.with_changes(size=int(SHARE * memory["middle"])))
    assert middle.predicted_loss == same.predicted_loss

    told = found.to_dict()
    budget = told["best_that_fits"]["middle"]["budget"]
    again = allocate(scores, recipe.with_changes(bits=budget))
    assert again.folder_bytes <= SHARE * memory["middle"]
    assert middle.average_bits - again.average_bits < 0.03
    text = proposal_table(told)
    assert f"middle: the best that fits is --bits {budget:g}" in text
    assert "small: not even the smallest fits" in text
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    fits = [row[-2] for row in rows]  # the column of "middle"
    assert fits == sorted(fits, reverse=True) and {*fits} == {"yes", "no"}


def test_the_bits_that_are_told_are_possible() -> None:
    """The smallest average has no two decimals: 1 + 3 / 36 with 36 experts of 1, 2 and 3 bits."""
    scores = synthetic.scores(2, 36)
    recipe = Recipe.load("paper", sensitivity="none")
    low = budget_range(scores, recipe).size[0]
    told = proposal(scores, recipe, {"small": int(low / SHARE) + 2}).to_dict()
    text = proposal_table(told)
    (best,) = re.findall(r"the best that fits is --bits ([\d.]+),", text)
    again = allocate(scores, recipe.with_changes(bits=float(best)))
    assert again.folder_bytes == told["best_that_fits"]["small"]["folder_bytes"] == low
    for row in [line for line in text.splitlines() if line[:1].isdigit()]:
        allocate(scores, recipe.with_changes(bits=float(row.split()[0])))
    assert text.splitlines()[1].split()[0] == "1.09"


def test_scores_are_kept_for_compress_and_only_for_the_same_work(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(text_file)
    out, straight = tmp_path / "out", tmp_path / "straight"
    found = propose(model_folder(), out, recipe)
    kept = (out / SCORES).read_bytes()
    assert found.memory == memory() and found.best["RAM"] is not None
    with pytest.raises(InputError, match="differ in: recipe"):
        compress(model_folder(), out, small_recipe(text_file, bits=2, token_floor=32))
    assert not (out / "config.json").exists()
    compress(model_folder(), out, recipe.with_changes(bits=2))
    compress(model_folder(), straight, recipe.with_changes(bits=2))
    assert (out / SCORES).read_bytes() == kept
    for shard in straight.glob("model-*.safetensors"):
        assert shard.read_bytes() == (out / shard.name).read_bytes()
    again = propose(model_folder(), out, recipe)  # beside the finished model
    assert [p.predicted_loss for p in again.plans] == [p.predicted_loss for p in found.plans]
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("Dear reader")
    with pytest.raises(InputError, match="not made by moepress"):
        propose(model_folder(), full, recipe)


def test_a_model_that_was_made_from_a_plan_gets_scores(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is held meanwhile, and no unfinished work stays there."""
    recipe = small_recipe(text_file)
    plan = allocate(score(model_folder(), recipe), recipe.with_changes(bits=2))
    out = quantize(model_folder(), plan, tmp_path / "out")
    before = {path.name for path in out.iterdir()}
    module = importlib.import_module("moepress.compress")
    score_tensors = module.score_tensors

    def scored(*arguments: object) -> object:
        assert (out / WORK / LOCK).is_file()
        return score_tensors(*arguments)

    monkeypatch.setattr(module, "score_tensors", scored)
    assert propose(model_folder(), out, recipe).plans
    assert {path.name for path in out.iterdir()} == before | {SCORES}
