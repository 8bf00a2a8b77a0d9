"""Damaged folders and documents of moepress: refused, harmless, or found by --verify."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.calibrate import calibrate
from moepress.compress import compress
from moepress.evaluate import evaluate
from moepress.format.checkpoint import DROP_COSTS, PLAN, SCORES
from moepress.prune import Pruning
from moepress.pruning.stored import stored_costs
from tests.conftest import small_recipe
from tests.damage import SEED, documents, folders, variants_or
from tests.damage.readers import (
    DOCUMENTS,
    check,
    document_outcome,
    folder_outcome,
    logits_of,
    outcomes,
)

VARIANTS = variants_or(30)


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compressed folder."""
    recipe = small_recipe(text_file, sequences=4, expert_bits=(1, 2))
    return compress(model_folder("qwen2_moe"), tmp_path_factory.mktemp("x") / "x", recipe, bits=1.5)


@pytest.fixture(scope="module")
def written(
    made: Path,
    model_folder: Callable[..., Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with one document of each kind, by the names of `DOCUMENTS`."""
    folder, original = tmp_path_factory.mktemp("documents"), model_folder("qwen2_moe")
    recipe = small_recipe(text_file, sequences=4)
    for name, stored in (("plan.json", PLAN), ("scores.safetensors", SCORES)):
        (folder / name).write_bytes((made / stored).read_bytes())
    (folder / "drops.safetensors").write_bytes((made / DROP_COSTS).read_bytes())
    calibrate(original, recipe).save(folder / "calibration.safetensors")
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    (folder / "recipe.toml").write_text("bits = 2.5\nsequences = 8\nexpert_bits = [1, 2]\n")
    pruning = Pruning.of(stored_costs(made), 0.2)
    (folder / "pruning.json").write_text(json.dumps(pruning.to_json()))
    found = evaluate(made, [str(text_file)], against=original, length=32, limit=2, generations=1)
    found.save(folder / "evaluation.json")
    return folder


def some(
    found: list[tuple[str, Callable[[Path], None]]],
) -> list[tuple[str, Callable[[Path], None]]]:
    return random.Random(SEED).sample(found, min(VARIANTS, len(found)))


def test_damaged_folders(made: Path, tmp_path: Path) -> None:
    expected = logits_of(made)
    found = list(folders.variants(made, random.Random(SEED), max(20, VARIANTS // 3)))
    check(
        outcomes(some(found), made, tmp_path, lambda folder: folder_outcome(folder, expected)),
        {"refused", "same"},
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_damaged_documents(written: Path, tmp_path: Path, name: str) -> None:
    assert document_outcome(written / name) == "read"
    found = list(documents.variants(written / name, random.Random(SEED), max(20, VARIANTS // 3)))
    check(outcomes(some(found), written / name, tmp_path, document_outcome), {"refused"})
