"""A folder is never larger than was predicted: a budget in bytes is an upper bound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepress.allocation.plan import BitAllocation
from moepress.compress import compress
from moepress.format.checkpoint import PLAN, folder_bytes
from tests.conftest import small_recipe

Folder = Callable[..., Path]
LONG = "é" + 40 * "long name "


def slack(out: Path) -> int:
    """Predicted bytes less those on disk."""
    return BitAllocation.load(out / PLAN).folder_bytes - folder_bytes(out)


@pytest.mark.parametrize(
    ("family", "name", "changes"),
    [
        ("mixtral", "default", {"bits": 2.3}),
        ("mixtral", "default", {"bits": 1.0, "expert_bits": (0, 1, 1.5)}),
        ("qwen2_moe", "fast", {"bits": 2.3}),
        ("deepseek_v3", "default", {"bits": 2.3, "over": "worst"}),
        ("deepseek_v3", "paper", {"bits": 2.0}),
    ],
)
def test_a_folder_is_not_larger_than_predicted(
    family: str,
    name: str,
    changes: dict[str, Any],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    recipe = small_recipe(text_file, name, **changes)
    out = compress(model_folder(family), tmp_path / "out", recipe)
    assert 0 <= slack(out) < 0.02 * folder_bytes(out)


def test_many_texts_of_long_names_are_counted(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / LONG[:60]).mkdir()
    texts = [tmp_path / LONG[:60] / f"{LONG[:90]}{number}" for number in range(6)]
    for text in texts:
        shutil.copy(text_file, text)
    calib = tuple((str(text), 1.0) for text in texts)
    recipe = small_recipe(text_file, bits=2, calib=calib, sequences=6)
    assert slack(compress(model_folder(), tmp_path / "out", recipe)) >= 0
