"""Layers larger than memory: routed experts are in memory one at a time, in every stage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moepress.compress import compress
from moepress.evaluate import evaluate
from moepress.original import batches
from moepress.original.experts import ExpertWeights
from moepress.original.source import Source
from tests.conftest import small_recipe

Folder = Callable[..., Path]


class Alive:
    """Counts the matrices of original experts that exist at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.read = 0
        expert = Source.expert

        def counted(source: Source, layer: int, index: int) -> ExpertWeights:
            weights = expert(source, layer, index)
            self.read += 1
            for matrix in (weights.gate_up, weights.down):
                self.now += 1
                weakref.finalize(matrix, self._gone)
            self.most = max(self.most, self.now)
            return weights

        monkeypatch.setattr(Source, "expert", counted)

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("recipe", ["default", "fast"])
def test_one_expert_is_in_memory_at_a_time(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """At most the one at work, and the next one while it is read: four matrices."""
    alive = Alive(monkeypatch)
    folder = model_folder("qwen2_moe", "bfloat16")
    out = compress(folder, tmp_path / "out", small_recipe(text_file, recipe, bits=2.5))
    evaluate(out, [str(text_file)], against=folder, length=32, limit=2)
    assert alive.read > 24  # 2 layers of 6 experts, scored, quantized and evaluated
    assert 2 <= alive.most <= 4
    assert alive.now == 0


def test_packed_experts_of_a_large_layer_are_mapped(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are the same whether they are in memory or in a temporary file."""
    folder, recipe = (
        model_folder(),
        small_recipe(text_file, bits=2.5, measure="rtn", quantizer="rtn"),
    )
    files = [tmp_path / name / "model-layer-0000.safetensors" for name in ("memory", "mapped")]
    compress(folder, files[0].parent, recipe)
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(batches, "IN_MEMORY", 1000)
    monkeypatch.setattr(
        torch, "from_file", lambda *a, **k: mapped.append(k["dtype"]) or from_file(*a, **k)
    )
    compress(folder, files[1].parent, recipe)
    assert mapped.count(torch.uint8) == 2 * 2  # two projections of two layers
    assert files[0].read_bytes() == files[1].read_bytes()
