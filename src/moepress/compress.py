"""The whole pipeline on one screen: score, allocate, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moepress.allocate import best_plan, warn_of_left_out
from moepress.allocation.tensors import ModelTensors
from moepress.costs.scores import ExpertScores
from moepress.estimate import announce_estimate
from moepress.format.checkpoint import SCORES, WORK
from moepress.original.source import Source
from moepress.quantize import quantize_tensors
from moepress.ranks import here
from moepress.recipe import Recipe
from moepress.request import Request
from moepress.score import score_tensors
from moepress.work import (
    begin,
    check_output,
    claim,
    identity,
    kept_ids,
    of_scores,
    output_held,
    own_text,
    stored_scores,
    whole_identity,
)


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = "default",
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    **changes: Any,
) -> Path:
    """Compress a Mixture-of-Experts model into a folder that transformers opens.

    Args:
        model: folder of the original model, or its hub id.
        out: folder to make. A stopped run is continued by the same call.
        recipe: a Recipe, the name of one ("default", "fast", "paper"), or a TOML or JSON file.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        trust_remote_code: run code in the model's folder, where transformers has no class for it.
        changes: fields of the recipe to set, such as bits=2.5 or calib=(("text.txt", 1.0),).

    Returns:
        The folder.

    Raises:
        InputError: model, recipe, text or folder cannot be used; nothing was written.
        BudgetError: no allocation meets the budget; nothing was written.
        CheckpointError: no space left; everything finished is kept.
    """
    out = Path(out)
    here().agreed(lambda: check_output(out))
    request = Request.of(model, recipe, device, trust_remote_code, needs_budget=True, **changes)
    announce_estimate(request, out)
    with output_held(out) as folder:
        return _compress(request, out, folder)


def _compress(request: Request, out: Path, folder: Path) -> Path:
    """`compress` in an output that is held, with its work folder."""
    ranks = here()
    source, recipe, tensors = request.source, request.recipe, request.tensors
    if own_text(recipe) and ranks.agreed(lambda: claim(out, whole_identity(source, recipe, None))):
        return out
    ids = ranks.agreed(lambda: kept_ids(folder, source, recipe))
    work = whole_identity(source, recipe, ids)
    if ranks.agreed(lambda: claim(out, work)):
        return out
    # Raises for scores of other work, before any writing.
    stored = ranks.agreed(lambda: stored_scores(out, of_scores(work)))
    ranks.agreed(lambda: begin(out, ids, work))
    scores = stored or score_and_store(source, recipe, tensors, ids, out)
    plan = ranks.agreed(lambda: best_plan(scores, recipe))
    warn_of_left_out(scores, plan)
    return quantize_tensors(source, plan, tensors, ids, out)


def score_and_store(
    source: Source, recipe: Recipe, tensors: ModelTensors, ids: Tensor, out: Path
) -> ExpertScores:
    """Score a model, or continue a stopped run, and store the scores in the output folder.

    Args:
        ids: [S, L] calibration sequences.
    """
    here().agreed(lambda: begin(out, ids, identity(source, recipe, ids)))
    scores = score_tensors(source, recipe, tensors, ids, out / WORK / "score")
    here().agreed(lambda: scores.save(out / SCORES))
    return scores
