"""Damaged originals end in one line, or are the model that transformers loads."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from moepress.inspect import inspect
from tests.conftest import small_recipe
from tests.damage import SEED, commands, variants_or
from tests.damage.ending import outcome
from tests.damage.outcome import run, table
from tests.damage.readers import check, logits_of
from tests.damage.record import recorded
from tests.damage.sources import damaged, variants

VARIANTS = variants_or(45)
COMPRESSED = max(3, variants_or(0) // 5)  # they take seconds
# By seed. The usual one is tied, and has biases and shared experts.
FAMILY = ("qwen2_moe", "mixtral", "deepseek_v3")[(SEED + 1) % 3]


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder(FAMILY, dtype="bfloat16", max_shard_size="60KB")


def test_damage_is_refused_or_harmless(folder: Path, text_file: Path) -> None:
    outcomes = run(folder, small_recipe(text_file, sequences=4), VARIANTS, SEED)
    print(table(outcomes))
    check(outcomes, {"refused", "taken"})  # neither everything is refused, nor nothing


def test_compressing_a_damaged_original(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """By the command, to the end: a whole folder, or none."""
    copy, out = tmp_path / "copy", tmp_path / "out"
    small = ["--calib", str(text_file), "--sequences", "2", "--sequence-length", "16"]
    words = ["compress", str(copy), "--recipe", "fast", "--bits", "2", *small]

    def compressed(number: int) -> str:
        to = out / str(number)
        told = commands.outcome([*words[:2], str(to), *words[2:]])
        if told != "done":
            refused = told.startswith("refused: 2")  # before any work
            left = to.exists() if refused else (to / "config.json").exists()
            return f"WRONG: left behind: {told}" if left else told

        def opened() -> str:
            inspect(to, verify=True)
            return "done" if logits_of(to).isfinite().all() else "WRONG: another model"

        return outcome(opened)

    found = islice(variants(folder, random.Random(SEED + 1)), COMPRESSED)
    told = {}
    for number, (name, apply) in enumerate(found):
        damaged(folder, apply, copy)
        told[name] = recorded(name, partial(compressed, number))
    check(told, {"refused"})
