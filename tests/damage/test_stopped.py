"""Damaged work folders of a stopped run: the same bytes in the end, or one line."""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.compress import compress
from moepress.recipe import Recipe
from moepress.work import WORK
from tests.conftest import small_recipe
from tests.damage import SEED, variants_or
from tests.damage.ending import outcome
from tests.damage.folders import inside
from tests.damage.parts import Variants, damaged_bytes, damaged_header, damaged_json, kinds
from tests.damage.readers import check, outcomes

VARIANTS = variants_or(4)
STAGE = ("quantize", "score")[SEED % 2]  # that was stopped


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def variants(path: Path, rng: random.Random) -> Variants:
    """Damage to the files of unfinished work."""
    for file in sorted((path / WORK).rglob("*.*")):
        if file.suffix not in (".json", ".safetensors"):
            continue
        name = str(file.relative_to(path))
        yield from inside(name, kinds(rng))
        yield from inside(name, damaged_bytes(file, rng, 10))
        if file.suffix == ".json":
            yield from inside(name, damaged_json(file, rng, 10))
        else:
            yield from inside(name, damaged_header(file, rng, 10))


def test_damaged_work(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = model_folder("qwen2_moe")
    recipe: Recipe = small_recipe(text_file, sequences=4, bits=1.5)
    right = digests(compress(model, tmp_path / "right", recipe))
    module = importlib.import_module(f"moepress.{STAGE}")
    real = getattr(module, f"{STAGE}_layer")

    def stops(walk: object, layer: int, *rest: object) -> object:
        if layer == 1:
            raise KeyboardInterrupt
        return real(walk, layer, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, f"{STAGE}_layer", stops)
        compress(model, tmp_path / "stopped", recipe)

    def gone_on(copy: Path) -> str:
        def run() -> str:
            compress(model, copy, recipe)
            return "same" if digests(copy) == right else "WRONG: other bytes"

        return outcome(run)

    found = list(variants(tmp_path / "stopped", random.Random(SEED)))
    some = random.Random(SEED).sample(found, min(VARIANTS, len(found)))
    work = tmp_path / "work"
    work.mkdir()
    check(outcomes(iter(some), tmp_path / "stopped", work, gone_on), {"refused"})
