"""What becomes of a damaged original: refused in one line, or the model that transformers loads."""

from __future__ import annotations

import logging
import random
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.original.companions import companions
from moepress.original.source import Source
from moepress.original.usable import check_usable
from moepress.recipe import Recipe
from moepress.work import calibration_ids
from tests.damage import ending
from tests.damage.record import recorded
from tests.damage.sources import damaged, variants


def outcome(folder: Path, recipe: Recipe, longest: int = ending.LONGEST) -> str:
    """What becomes of a folder: "refused: ...", "taken", or else what is wrong.

    Everything is read that a compression reads: all tensors, the text, the companions.
    """
    state: dict[str, Tensor] = {}

    def read() -> str:
        source = Source(folder)
        check_usable(source)
        calibration_ids(source, recipe)
        source.config_json()
        companions(folder)
        state.update(_state(source))
        return "taken"

    found = ending.outcome(read, longest)
    return _compared(folder, state) if found == "taken" else found


def _state(source: Source) -> dict[str, Tensor]:
    """Every tensor as a compression reads it, by its name in transformers' class."""
    state = {name: source.tensor(name) for name in source.all_names}
    for experts in source.experts.values():
        state |= {name: source.fused(name) for name in experts.matrix_names}
    return state


def _compared(folder: Path, state: dict[str, Tensor]) -> str:
    from transformers import AutoModelForCausalLM

    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except Exception as error:
        return f"taken, transformers refuses: {type(error).__name__}: {str(error)[:200]}"
    finally:
        logging.getLogger("transformers").setLevel(level)
    theirs = model.state_dict()
    for name, value in state.items():
        if name not in theirs or theirs[name].shape != value.shape:
            return f"WRONG: another model: {name}"
        if not torch.equal(theirs[name].float(), value.float()):
            return f"WRONG: other weights: {name}"
    tied = {name for name in theirs if name not in state}
    if any(not any(torch.equal(theirs[n], value) for value in state.values()) for n in tied):
        return f"WRONG: not read: {sorted(tied)}"
    return "taken"


def table(outcomes: dict[str, str]) -> dict[str, dict[str, int]]:
    """Number of outcomes by kind of damage, then by kind of outcome."""
    found: dict[str, dict[str, int]] = {}
    for name, result in outcomes.items():
        row = found.setdefault(name.split()[1].rstrip(":"), {})
        kind = result.split(":")[0].split(",")[0]
        row[kind] = row.get(kind, 0) + 1
    return found


def run(folder: Path, recipe: Recipe, count: int, seed: int) -> dict[str, str]:
    """Outcomes of some variants of a folder, by name."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as work:
        for name, apply in islice(variants(folder, random.Random(seed)), count):
            copy = damaged(folder, apply, Path(work) / "copy")
            outcomes[name] = recorded(name, partial(outcome, copy, recipe))
    return outcomes
