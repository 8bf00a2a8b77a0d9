"""What becomes of damaged folders and documents of moepress, by every reader.

"refused": one line. "same": nothing changed. "told": another model, and `--verify` says so.
Anything else begins with "WRONG".
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.allocation.plan import BitAllocation
from moepress.calibrate import Calibration
from moepress.costs.drop_costs import DropCosts
from moepress.costs.scores import ExpertScores
from moepress.errors import MoepressError
from moepress.evaluation.document import load_evaluation
from moepress.hf import load_model
from moepress.inspect import inspect
from moepress.prune import parse_strength
from moepress.recipe import Recipe
from moepress.report import read_subject
from tests.damage.ending import outcome
from tests.damage.parts import Variants
from tests.damage.record import recorded

IDS = torch.tensor([[5, 9, 300, 17, 2, 44, 8, 31]])
DOCUMENTS: dict[str, Callable[[Path], object]] = {
    "plan.json": BitAllocation.load,
    "recipe.json": Recipe.load,
    "recipe.toml": Recipe.load,
    "pruning.json": lambda path: parse_strength(str(path)),
    "evaluation.json": load_evaluation,
    "scores.safetensors": ExpertScores.load,
    "calibration.safetensors": Calibration.load,
    "drops.safetensors": DropCosts.load,
}


@torch.no_grad()
def logits_of(folder: Path) -> Tensor:
    model: Any = load_model(folder)
    return model(IDS).logits.float()


def folder_outcome(folder: Path, expected: Tensor) -> str:
    """What becomes of a compressed folder when it is opened, inspected and reported."""

    def opened() -> str:
        if torch.equal(logits_of(folder), expected):
            return "same"
        try:
            inspect(folder, verify=True)
        except MoepressError:
            return "told"
        return "WRONG: another model"

    def described() -> str:
        inspect(folder)
        read_subject(folder)
        return "same"

    first, second = outcome(opened), outcome(described)
    return second if second.startswith("WRONG") else first


def document_outcome(path: Path) -> str:
    """What becomes of a document of `DOCUMENTS`, told by its file name, when it is read."""

    def read() -> str:
        DOCUMENTS[path.name](path)
        return "read"

    return outcome(read)


def outcomes(
    found: Variants, intact: Path, work: Path, read: Callable[[Path], str]
) -> dict[str, str]:
    """The outcome of each variant of a file or folder, by name."""
    told: dict[str, str] = {}
    copy = work / intact.name
    for name, apply in found:
        if intact.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(intact, copy)
        else:
            _remove(copy)
            shutil.copyfile(intact, copy)
        apply(copy)
        told[name] = recorded(name, partial(read, copy))
    return told


def check(told: Mapping[str, str], kinds: set[str]) -> None:
    """No outcome is wrong, and there are outcomes of these kinds."""
    print(Counter(result.split(":")[0] for result in told.values()))
    assert not {name: result for name, result in told.items() if result.startswith("WRONG")}
    assert kinds <= {result.split(":")[0] for result in told.values()}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
