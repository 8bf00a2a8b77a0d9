"""Hostile words of a command line, and damaged files beside the weights: results, or one line."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from moepress.compress import compress
from moepress.format.checkpoint import PLAN, SCORES
from tests.conftest import small_recipe
from tests.damage import SEED, commands, companions, variants_or
from tests.damage.readers import check, outcomes
from tests.damage.record import recorded

VARIANTS = variants_or(12)


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compressed folder with every companion."""
    recipe = small_recipe(text_file, sequences=4)
    out = compress(model_folder("qwen2_moe"), tmp_path_factory.mktemp("x") / "x", recipe, bits=1.5)
    companions.add_missing(out)
    return out


def test_damaged_companions(made: Path, tmp_path: Path) -> None:
    def used(folder: Path) -> str:
        told = commands.outcome(["generate", str(folder), "def f", "--tokens", "2"])
        if told.startswith("WRONG"):
            return told
        return commands.outcome(["chat", str(folder), "--tokens", "2"], typed="hi\n")

    assert used(made) == "done"
    rng = random.Random(SEED)
    found = list(companions.variants(made, rng, max(20, VARIANTS // 3)))
    check(outcomes(rng.sample(found, min(VARIANTS, len(found))), made, tmp_path, used), {"refused"})


def test_hostile_words(
    made: Path, text_file: Path, model_folder: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    work, copy = tmp_path / "work", tmp_path / "copy"
    small = ["--calib", str(text_file), "--sequences", "2", "--sequence-length", "16"]
    model, out = str(model_folder("qwen2_moe")), str(work / "out")
    good = {
        "compress": [model, out, *small, "--recipe", "fast", "--bits", "2", "--dry-run"],
        "score": [model, f"{out}.safetensors", *small, "--recipe", "fast"],
        "calibrate": [model, f"{out}.safetensors", *small],
        "allocate": [str(made / SCORES), f"{out}.json", "--bits", "2"],
        "quantize": [model, str(made / PLAN), out],
        "generate": [str(made), "def f", "--tokens", "2"],
        "chat": [str(made), "--raw", "--tokens", "2"],
        "evaluate": [str(made), "--text", str(text_file), "--limit", "1", "--generations", "0"],
        "prune": [str(copy), "0.1"],
        "dequantize": [str(made), out],
        "serve": [str(tmp_path / "nothing")],
    }

    def ran(words: list[str]) -> str:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        work.mkdir()
        shutil.copytree(made, copy)
        monkeypatch.chdir(work)
        outcome = commands.outcome(words, typed="hi\n")
        left = sorted(path.name for path in work.iterdir())
        return f"WRONG: left behind {left}: {outcome}" if left and outcome != "done" else outcome

    found = islice(commands.variants(good, random.Random(SEED)), VARIANTS)
    check({name: recorded(name, partial(ran, words)) for name, words in found}, {"refused"})
