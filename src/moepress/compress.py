"""The whole pipeline on one screen: score, allocate, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepress.allocate import Menu, allocate, expert_budget
from moepress.calibrate import TEXT, identity, keep_ids, kept_ids
from moepress.checkpoint import SCORES
from moepress.journal import check_identity
from moepress.layout import check_group_sizes
from moepress.quantize import WORK, claim, quantize
from moepress.recipe import Recipe
from moepress.score import ExpertScores, score, unmeasured
from moepress.source import Source


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
        BudgetError: no allocation meets the budget; nothing was written.
        CheckpointError: no space left; everything finished is kept.
    """
    out = Path(out)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe.with_changes(**changes)
    source = Source(model, device)
    check_group_sizes(source, recipe)
    sizes = unmeasured(source, recipe)
    expert_budget(sizes, recipe, Menu.of(sizes, recipe))  # refused now, not after hours of scoring
    ids = kept_ids(out / WORK / TEXT, source, recipe)
    work = identity(source, recipe, ids) | {"full_recipe": recipe.digest()}
    if claim(out, work):
        return out
    keep_ids(out / WORK / TEXT, ids)
    check_identity(out / WORK / "compress.json", work)
    if (out / SCORES).is_file():
        scores = ExpertScores.load(out / SCORES)
    else:
        scores = score(source, recipe, work=out / WORK / "score", ids=ids)
        scores.save(out / SCORES)
    return quantize(source, allocate(scores, recipe), out, ids=ids)
