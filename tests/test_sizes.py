"""The table of sizes in docs: what the script prints, counted as a real folder is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from moepress.allocation.tensors import ModelTensors
from moepress.costs.scores import ExpertScores
from moepress.original.folder import read_config
from moepress.original.source import Source
from moepress.score import unmeasured

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/sizes.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks here")


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_shape_counts_like_the_model(
    sizes: ModuleType, model_folder: Callable[..., Path], family: str
) -> None:
    folder = model_folder(family)
    recipe = sizes.DEFAULT.with_changes(group_size=32)

    def counted(source: Source) -> ExpertScores:
        return unmeasured(source, recipe, ModelTensors.of(source, recipe))

    shape, model = counted(sizes.Shape(folder, read_config(folder))), counted(Source(folder))
    for name in ("fixed_bytes", "other_weights", "file_bytes", "gate_up_shape", "down_shape"):
        assert getattr(shape, name) == getattr(model, name), name
    assert shape.tokens.shape == model.tokens.shape


def test_the_page_shows_what_the_script_computes(sizes: ModuleType) -> None:
    models = [sizes.describe(name) for name in sizes.PUBLISHED]
    page = (ROOT / "docs/sizes.md").read_text()
    again = "run: python benchmarks/sizes.py"
    assert sizes.table(models, sizes.RAM, "RAM") in page, again
    assert sizes.caption(models, sizes.RAM, "RAM", "") in page, again


def test_every_shape_is_in_the_table(sizes: ModuleType) -> None:
    assert {path.stem for path in sizes.SHAPES.glob("*.json")} == {*sizes.PUBLISHED, *sizes.MORE}
