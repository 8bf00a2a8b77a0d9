"""The whole pipeline on one screen: score, allocate, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepress.allocate import allocate
from moepress.calibrate import calibration_ids, identity
from moepress.checkpoint import SCORES
from moepress.errors import InputError
from moepress.quantize import WORK, claim, quantize
from moepress.recipe import Recipe
from moepress.score import ExpertScores, score
from moepress.source import Source
from moepress.walk import check_identity


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
        recipe: a Recipe, the name of one ("default", "paper"), or a file.
        device: "cpu" or "cuda".
        changes: fields of the recipe to set, such as bits=2.5 or calib=(("text.txt", 1.0),).

    Returns:
        The folder.

    Raises:
        InputError: model, recipe, text or folder cannot be used; nothing was written.
        BudgetError: no allocation meets the budget; the scores are kept for another try.
        CheckpointError: no space left; everything finished is kept.
    """
    out = Path(out)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe.with_changes(**changes)
    if not recipe.has_budget:
        raise InputError("No budget. Give one of bits (say 2.5), bpw, or size.")
    source = Source(model, device)
    ids = calibration_ids(source, recipe)
    work = identity(source, recipe, ids) | {"full_recipe": recipe.digest()}
    if claim(out, work):
        return out
    check_identity(out / WORK / "compress.json", work)
    if (out / SCORES).is_file():
        scores = ExpertScores.load(out / SCORES)
    else:
        scores = score(source, recipe, work=out / WORK / "score", ids=ids)
        scores.save(out / SCORES)
    return quantize(source, allocate(scores, recipe), out, ids=ids)
