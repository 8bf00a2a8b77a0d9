"""The whole pipeline on one screen: score, allocate, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moepress.allocate import allocate, warn_of_left_out
from moepress.allocation.budget import Budget
from moepress.allocation.choices import Choices
from moepress.allocation.tensors import ModelTensors, check_group_sizes
from moepress.costs.scores import ExpertScores
from moepress.format.checkpoint import SCORES
from moepress.format.journal import check_identity
from moepress.original.source import Source
from moepress.quantize import quantize_tensors
from moepress.recipe import Recipe
from moepress.score import score_tensors, unmeasured
from moepress.work import WORK, claim, identity, keep_ids, kept_ids, stored_scores


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = "default",
    *,
    device: str = "cpu",
    **changes: Any,
) -> Path:
    """Compress a Mixture-of-Experts model into a folder that transformers opens.

    Args:
        model: folder of the original model, or its hub id.
        out: folder to make. A stopped run is continued by the same call.
        recipe: a Recipe, the name of one ("default", "fast", "paper"), or a TOML or JSON file.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        changes: fields of the recipe to set, such as bits=2.5 or calib=(("text.txt", 1.0),).

    Returns:
        The folder.

    Raises:
        InputError: model, recipe, text or folder cannot be used; nothing was written.
        BudgetError: no allocation meets the budget; nothing was written.
        CheckpointError: no space left; everything finished is kept.
    """
    out = Path(out)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe.with_changes(**changes)
    source = Source(model, device)
    check_group_sizes(source, recipe)
    tensors = ModelTensors.of(source, recipe)
    sizes = unmeasured(source, recipe, tensors)
    # Raise BudgetError for an impossible budget now, not after hours of scoring.
    Budget.of(sizes, recipe, Choices.of(sizes, recipe)).warn_of_excess()
    ids = kept_ids(out / WORK, source, recipe)
    made_of = identity(source, recipe, ids)
    work = made_of | {"full_recipe": recipe.digest()}
    if claim(out, work):
        return out
    stored = stored_scores(out, made_of)  # raises for scores of other work, before any writing
    keep_ids(out / WORK, ids)
    check_identity(out / WORK / "compress.json", work)
    scores = stored or score_and_store(source, recipe, tensors, ids, out)
    plan = allocate(scores, recipe)
    warn_of_left_out(scores, plan)
    return quantize_tensors(source, plan, tensors, ids, out)


def score_and_store(
    source: Source, recipe: Recipe, tensors: ModelTensors, ids: Tensor, out: Path
) -> ExpertScores:
    """Score a model, or continue a stopped run, and store the scores in the output folder.

    Args:
        ids: [S, L] calibration sequences.
    """
    keep_ids(out / WORK, ids)
    scores = score_tensors(source, recipe, tensors, ids, out / WORK / "score")
    scores.save(out / SCORES)
    return scores
