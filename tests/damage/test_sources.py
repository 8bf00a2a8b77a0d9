"""Damaged originals end in one line, or are the model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import small_recipe
from tests.damage import SEED, variants_or
from tests.damage.outcome import run, table

VARIANTS = variants_or(45)


@pytest.mark.parametrize("family", ["qwen2_moe"])  # it is tied, and has biases and shared experts
def test_damage_is_refused_or_harmless(
    model_folder: Callable[..., Path], text_file: Path, family: str
) -> None:
    folder = model_folder(family, dtype="bfloat16", max_shard_size="60KB")
    recipe = small_recipe(text_file, sequences=4)
    outcomes = run(folder, recipe, VARIANTS, SEED)
    print(table(outcomes))
    assert not {name: told for name, told in outcomes.items() if told.startswith("WRONG")}
    kinds = {told.split(":")[0] for told in outcomes.values()}
    assert {"refused", "taken"} <= kinds  # neither everything is refused, nor nothing
