"""Costs may be measured on some of the calibration sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moepress.costs import scored
from moepress.costs.scored import LEAST_SEQUENCES, scored_count, scored_sequences
from moepress.costs.scores import EXPERT_ARRAYS, ExpertScores
from moepress.costs.texts import Texts
from moepress.inspect import inspect
from moepress.original.source import Source
from moepress.score import score
from moepress.text.windows import divide
from moepress.work import calibration_ids
from tests.conftest import small_recipe

Folder = Callable[..., Path]


@pytest.mark.parametrize(
    ("sequences", "length", "used", "tokens", "count"),
    [
        (128, 512, 2 / 8, 4096, 32),  # Mixtral-8x7B: 4096 tokens of an expert in 32 sequences
        (128, 512, 8 / 128, 4096, 128),  # Qwen3-30B-A3B: all
        (120, 256, 2 / 8, 4096, 64),
        (128, 2048, 2 / 8, 4096, LEAST_SEQUENCES),  # 8 would do, but of few texts
        (128, 512, 2 / 8, 0, 128),  # 0: all
        (16, 512, 2 / 8, 1, 16),
        (100, 10, 1e-6, 4096, 100),
    ],
)
def test_enough_tokens_of_an_expert(
    sequences: int, length: int, used: float, tokens: int, count: int
) -> None:
    assert scored_count(sequences, length, 5, used, tokens) == count


def test_every_text_keeps_a_sequence() -> None:
    assert scored_count(500, 4096, 50, 0.25, 1) == 50


@pytest.mark.parametrize("weights", [[1.0], [1, 1, 1, 1, 1], [100, 1], [0.3, 2, 7, 0.01]])
@pytest.mark.parametrize(("sequences", "count"), [(128, 32), (37, 33), (64, 64), (10, 4)])
def test_sequences_of_texts_in_their_proportion(
    weights: list[float], sequences: int, count: int
) -> None:
    if count < len(weights):
        count = len(weights)
    chosen = scored_sequences(sequences, weights, count)
    assert len(chosen) == count and (chosen.diff() > 0).all()
    assert chosen.min() >= 0 and chosen.max() < sequences
    texts = Texts.of(torch.zeros(sequences, 3), weights)
    kept = torch.bincount(texts.of_token[::3][chosen], minlength=len(weights))
    whole = torch.tensor(divide(sequences, weights))
    assert torch.equal(texts.some(chosen, 3).tokens(), 3 * kept)
    assert (kept >= 1).all() and (kept <= whole).all()
    assert ((kept == 1) | ((kept - whole * count / sequences).abs() < len(weights))).all()


def test_scores_of_some_sequences_are_those_of_a_set_with_no_others(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "LEAST_SEQUENCES", 2)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    texts = ((str(text_file), 1.0), (str(other), 2.0))
    recipe = small_recipe(text_file, "default", calib=texts, sequences=12)
    source = Source(model_folder())
    ids = calibration_ids(source, recipe)
    few = recipe.with_changes(score_tokens=48)  # tiny models: half of the experts of a token
    some = score(source, few, ids=ids, work=tmp_path / "work")
    used = some.tokens.sum() / some.tokens.size / some.total_tokens
    assert some.total_tokens < ids.numel() == some.calibration_tokens == some.all_tokens
    assert 48 <= used * some.total_tokens < 48 + used * ids.shape[1]
    chosen = scored_sequences(12, [1, 2], some.total_tokens // ids.shape[1])
    alone = score(source, recipe.with_changes(score_tokens=0), ids=ids[chosen])
    assert alone.total_tokens == alone.calibration_tokens == alone.all_tokens
    for name in (*EXPERT_ARRAYS, "linear_cost"):
        assert np.array_equal(getattr(some, name), getattr(alone, name)), name
    assert np.array_equal(some.reached, some.tokens * ids.numel() // some.total_tokens)
    some.save(tmp_path / "some.safetensors")
    loaded = ExpertScores.load(tmp_path / "some.safetensors")
    assert loaded.calibration_tokens == ids.numel()
    told = inspect(tmp_path / "some.safetensors")
    assert told["calibration_tokens"] == ids.numel()
    assert told["scored_tokens"] == some.total_tokens
    assert told["tokens_per_expert"]["most"] == some.reached.max()


def test_few_tokens_are_counted_over_the_whole_calibration_set(
    model_folder: Folder,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(scored, "LEAST_SEQUENCES", 2)
    recipe = small_recipe(text_file, "default", sequences=12, score_tokens=32)
    scores = score(model_folder(), recipe)
    floor = int(np.median(scores.tokens))
    few = int((scores.reached < floor).sum())
    assert 0 < few < (scores.tokens < floor).sum()
    score(model_folder(), recipe.with_changes(token_floor=floor))
    assert f"{few} of 8 experts saw fewer than {floor} calibration tokens" in caplog.text


def test_errors_of_real_rounding_are_measured_on_all_tokens(
    model_folder: Folder, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "LEAST_SEQUENCES", 2)
    recipe = small_recipe(text_file, "default", measure="gptq", score_tokens=1)
    assert score(model_folder(), recipe).total_tokens == recipe.sequences * recipe.sequence_length
