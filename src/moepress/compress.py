"""The whole pipeline on one screen: score, allocate, quantize."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moepress.allocate import allocate, tell_of_left_out
from moepress.allocation.budget import expert_budget, tell_of_excess
from moepress.allocation.choices import Menu
from moepress.allocation.tensors import check_group_sizes
from moepress.calibrate import TEXT, identity, keep_ids, kept_ids
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.format.checkpoint import SCORES
from moepress.original.journal import check_identity
from moepress.original.source import Source
from moepress.quantize import WORK, claim, quantize
from moepress.recipe import Recipe
from moepress.score import score, unmeasured


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
    tell_of_excess(sizes, recipe)
    ids = kept_ids(out / WORK / TEXT, source, recipe)
    made_of = identity(source, recipe, ids)
    work = made_of | {"full_recipe": recipe.digest()}
    if claim(out, work):
        return out
    stored = stored_scores(out, made_of)  # refuses those of other work before writing anything
    keep_ids(out / WORK / TEXT, ids)
    check_identity(out / WORK / "compress.json", work)
    scores = stored or measure_and_store(source, recipe, out, ids)
    plan = allocate(scores, recipe)
    tell_of_left_out(scores, plan)
    return quantize(source, plan, out, ids=ids)


def stored_scores(out: Path, made_of: Mapping[str, str]) -> ExpertScores | None:
    """The scores that are in `out` already.

    Args:
        made_of: what scores depend on, `calibrate.identity`.

    Raises:
        InputError: they are of another model, text or recipe.
    """
    path = out / SCORES
    if not path.is_file():
        return None
    scores = ExpertScores.load(path)
    differs = sorted(k for k, v in made_of.items() if scores.provenance.get(k) != v)
    if differs:
        raise InputError(
            f"{path} holds scores that differ in: {', '.join(differs)}. Give the model, text and "
            "options they were made with, choose another output, or delete that folder."
        )
    return scores


def measure_and_store(source: Source, recipe: Recipe, out: Path, ids: Tensor) -> ExpertScores:
    """Score, resumably, and keep the scores in `out`.

    Args:
        ids: [S, L] calibration sequences.
    """
    keep_ids(out / WORK / TEXT, ids)
    scores = score(source, recipe, work=out / WORK / "score", ids=ids)
    scores.save(out / SCORES)
    return scores
