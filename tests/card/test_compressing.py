"""Compression on a card gives the bytes that it gives on the CPU: the numbers are the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moepress
from moepress.compress import compress
from moepress.costs import sketch
from moepress.costs.scores import ExpertScores
from moepress.format.checkpoint import SCORES
from moepress.original.resident import ResidentExperts
from moepress.original.walk import Walk
from tests.card.tensors import Card
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model

pytestmark = pytest.mark.card

quantizing = importlib.import_module("moepress.quantize")
compressing = importlib.import_module("moepress.compress")  # the package has a function there
SHORT = {"bits": 2.5, "sequences": 3, "sequence_length": 16}
# What each case adds: half widths, the correction, gradients, gates with biases; neurons and scalar
# codes; a tied table; a loop; other measures, and costs by text; rounding to nearest.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gates and biases": ("gpt_oss", "default", {}),
    "neurons": ("doge", "fast", {"expert_bits": (1, 2, 3), "expert_codec": "int"}),
    "tied tables": ("qwen2_moe", "default", {"attention_bits": 3}),
    "loop": ("inkling2_loop_text", "fast", {"expert_bits": (2, 3)}),
    "two texts": ("mixtral", "default", {"measure": "gptq", "expert_bits": (1.5, 3)}),
    "rounded to nearest": ("mixtral", "paper", {"group_size": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_card_makes_the_same_folder(
    case: str,
    text_file: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, name, changes = CASES[case]
    source = save_model(make_model(family), tmp_path / "source", tokenizer_folder)
    recipe = small_recipe(text_file, name, **{**SHORT, **changes})
    if case == "two texts":
        recipe = recipe.with_changes(calib=((str(text_file), 1.0), (__file__, 2.0)), over="worst")
    if case != "tied tables":  # it takes seconds: once is enough
        monkeypatch.setattr(compressing, "announce_estimate", lambda request, out: None)
    same(*(compress(source, tmp_path / d, recipe, device=d) for d in ("cpu", "cuda")))
    assert card.peak > 100_000 and not card.copies


@pytest.fixture
def compare(
    model_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], None]:
    """Compresses Mixtral with `default` on the CPU and on the card, and compares the folders."""
    monkeypatch.setattr(compressing, "announce_estimate", lambda request, out: None)
    recipe = small_recipe(text_file, "default", **SHORT)
    made = (compress(model_folder(), tmp_path / d, recipe, device=d) for d in ("cpu", "cuda"))
    return lambda: same(*made)


def test_a_sketch_on_a_card(compare: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "ROWS", 16)
    compare()


def test_rounded_experts_that_run_together_on_a_card(
    compare: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where tokens are many: the sums of their outputs would take more room than the experts."""
    monkeypatch.setattr(quantizing, "experts_bytes", lambda source, layer: 1)
    taken: list[int] = []
    advance = Walk.advance_with

    def counted(walk: Walk, resident: ResidentExperts) -> float:
        taken.append(resident.layer)
        return advance(walk, resident)

    monkeypatch.setattr(Walk, "advance_with", counted)
    compare()
    assert taken == [0, 1]


def same(first: Path, second: Path) -> None:
    """Compare two compressed folders: equal bytes of packed tensors, scores up to float32."""
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for path in first.glob("model*.safetensors"):
        one, other = load_file(path), load_file(second / path.name)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    a, b = (ExpertScores.load(folder / SCORES) for folder in (first, second))
    for field in ("tokens", "routing_weight", "squared_error", "cost", "linear_cost"):
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=2e-3, atol=1e-9)


def test_commands_that_read_originals(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path, card: Card
) -> None:
    recipe = small_recipe(text_file, "fast", sequences=2, sequence_length=16)
    found = moepress.propose(model_folder(), tmp_path / "out", recipe, device="cuda")
    assert found.plans
    on_card, on_cpu = (
        moepress.evaluate(model_folder(), [str(text_file)], length=32, limit=2, device=device)
        for device in ("cuda", "cpu")
    )
    assert on_card.texts[0].perplexity == pytest.approx(on_cpu.texts[0].perplexity, rel=1e-5)
