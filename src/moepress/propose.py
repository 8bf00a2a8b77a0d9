"""Help to choose a budget: predicted loss and bytes of several, and the best that fits in memory.

Scoring takes most of the time of a compression and needs no budget. `propose` stores the scores
where `compress` finds them, so `compress` with a budget then needs only the remaining time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepress.allocate import allocate, frontier
from moepress.allocation.budget import budget_range
from moepress.allocation.choices import offered
from moepress.allocation.plan import BitAllocation
from moepress.compress import score_and_store
from moepress.costs.scores import ExpertScores
from moepress.errors import BudgetError
from moepress.estimate import announce_estimate
from moepress.format.checkpoint import SCORES, WORK, is_compressed
from moepress.memory import host_memory
from moepress.ranks import here
from moepress.recipe import Recipe
from moepress.request import Request
from moepress.work import (
    check_output,
    identity,
    kept_ids,
    output_held,
    own_text,
    stored_scores,
    work_held,
)
from moepress.writing.held import discard

STEP = 0.25  # bits between the budgets of the table
SHARE = 0.8  # of a memory, for the model; the KV cache and everything else need the rest


@dataclass(frozen=True)
class Proposal:
    """Plans from the smallest to the largest budget, and the best that fits each memory."""

    plans: tuple[BitAllocation, ...]
    memory: Mapping[str, int]  # bytes, by name: "RAM", "GPU"
    best: Mapping[str, BitAllocation | None]  # by memory; None: not even the smallest fits

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "proposal",
            "memory_bytes": dict(self.memory),
            "share_of_memory": SHARE,
            "budgets": [_row(plan) for plan in self.plans],
            "best_that_fits": {
                name: plan and {**_row(plan), "budget": self._budget(plan)}
                for name, plan in self.best.items()
            },
        }

    def _budget(self, plan: BitAllocation) -> float:
        """A number of bits with two decimals that gives this plan, or a barely smaller one."""
        short = math.floor(plan.average_bits * 100) / 100
        return short if short >= self.plans[0].average_bits else plan.average_bits


def propose(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Proposal:
    """Score a model, and make plans for budgets from the smallest to the largest.

    Args:
        model: folder of the original model, or its hub id.
        out: the folder that `compress` will make; scores are stored there.
        recipe: as for `compress`; its budget is ignored.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        trust_remote_code: run code in the model's folder, where transformers has no class for it.

    Raises:
        InputError: model, recipe, text or folder cannot be used, or `out` holds scores of other
            work.
    """
    out = Path(out)
    ranks = here()
    ranks.agreed(lambda: check_output(out))
    recipe = (recipe or Recipe()).with_changes(bits=None, bpw=None, size=None)
    request = Request.of(model, recipe, device, trust_remote_code)
    source, recipe = request.source, request.recipe
    announce_estimate(request, out)
    # A finished model of `quantize` has no scores yet: then its folder is written, too.
    scored = ranks.agreed(lambda: (out / SCORES).is_file())
    with output_held(out) if scored else work_held(out / WORK, out) as folder:
        own = own_text(recipe)
        ids = None if own else ranks.agreed(lambda: kept_ids(folder, source, recipe))
        scores = ranks.agreed(lambda: stored_scores(out, identity(source, recipe, ids)))
        if scores is None:
            if ids is None:
                ids = ranks.agreed(lambda: kept_ids(folder, source, recipe))
            scores = score_and_store(source, recipe, request.tensors, ids, out)
            if ranks.agreed(lambda: is_compressed(out)):
                ranks.agreed(lambda: discard(folder))
    return ranks.agreed(lambda: proposal(scores, recipe, memory()))


def proposal(scores: ExpertScores, recipe: Recipe, memory: Mapping[str, int]) -> Proposal:
    """The proposal for given scores and memories.

    Args:
        memory: bytes by name.
    """
    widths = offered(recipe)
    low, high = budget_range(scores, recipe).bits
    steps = np.arange(np.ceil(low / STEP), np.floor(high / STEP) + 1) * STEP
    bits = sorted({low, high, *steps.tolist()}) if recipe.cost != "uniform" else widths
    return Proposal(
        plans=tuple(frontier(scores, recipe, bits)),
        memory=dict(memory),
        best={name: _largest(scores, recipe, int(SHARE * size)) for name, size in memory.items()},
    )


def memory() -> dict[str, int]:
    """The memories of this machine that a model can run in, in bytes."""
    found = {"RAM": host_memory()}
    if torch.cuda.is_available():
        found["GPU"] = int(torch.cuda.get_device_properties(0).total_memory)
    return found


def _largest(scores: ExpertScores, recipe: Recipe, size: int) -> BitAllocation | None:
    """The best plan whose folder has at most `size` bytes; None: no plan is so small."""
    most = budget_range(scores, recipe).size[1]
    try:
        return allocate(scores, recipe.with_changes(size=min(size, most)))
    except BudgetError:
        return None


def _row(plan: BitAllocation) -> dict[str, float]:
    return {
        "bits": plan.average_bits,
        "bits_per_weight": plan.bits_per_weight,
        "folder_bytes": plan.folder_bytes,
        "predicted_loss": plan.predicted_loss,
    }
