"""A compressed folder for the tests of captured steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.compress import compress
from tests.conftest import small_recipe


@pytest.fixture(scope="session")
def packed(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small Mixtral at 2 bits, recipe `fast`. Tests do not change it."""
    out = tmp_path_factory.mktemp("packed") / "folder"
    return compress(model_folder(), out, small_recipe(text_file, bits=2))
