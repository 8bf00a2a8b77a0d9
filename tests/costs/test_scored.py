"""Costs may be measured on some of the calibration sequences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.costs import scored
from moepress.costs.scored import LEAST_SEQUENCES, scored_count, scored_sequences
from moepress.costs.scores import EXPERT_ARRAYS, ExpertScores
from moepress.costs.texts import Texts
from moepress.errors import FileError
from moepress.inspect import inspect
from moepress.original.source import Source
from moepress.page.sections.calibration import coverage
from moepress.recipe import Recipe
from moepress.report import expert_values
from moepress.score import score
from moepress.text.windows import divide
from moepress.work import calibration_ids
from tests import synthetic
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
        (5000, 6, 2 / 8, 1000, 667),  # 1.5 tokens of an expert in a sequence
    ],
)
def test_enough_tokens_of_an_expert(
    sequences: int, length: int, used: float, tokens: int, count: int
) -> None:
    assert scored_count(sequences, length, 5, used, tokens) == count


def test_many_texts_keep_four_sequences_each_in_the_mean() -> None:
    count = scored_count(500, 4096, 50, 0.25, 1)
    assert count == 200
    weights = [951.0] + [1.0] * 49  # 451 sequences of one text, one of each other
    chosen = scored_sequences(500, weights, count)
    assert (chosen < 451).sum() >= 3 / 4 * count and scored_count(60, 4096, 50, 0.25, 1) == 60


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


@pytest.fixture
def other_text(text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(text_file.read_text()[::-1])
    return path


def test_scores_of_some_sequences_are_those_of_a_set_with_no_others(
    model_folder: Folder,
    text_file: Path,
    other_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scored, "LEAST_SEQUENCES", 2)
    monkeypatch.setattr(scored, "SEQUENCES_OF_TEXT", 1)
    texts = ((str(text_file), 1.0), (str(other_text), 2.0))
    recipe = small_recipe(text_file, "default", calib=texts, sequences=12)
    source = Source(model_folder())
    ids = calibration_ids(source, recipe)
    few = recipe.with_changes(score_tokens=48)  # tiny models: half of the experts of a token
    some = score(source, few, ids=ids, work=tmp_path / "work")
    used = some.tokens.sum() / some.tokens.size / some.total_tokens
    assert some.total_tokens < ids.numel() == some.all_tokens == sum(some.text_tokens)
    assert 48 <= used * some.total_tokens < 48 + used * ids.shape[1]
    chosen = scored_sequences(12, [1, 2], some.total_tokens // ids.shape[1])
    alone = score(source, recipe.with_changes(score_tokens=0), ids=ids[chosen])
    assert alone.total_tokens == alone.all_tokens
    for name in (*EXPERT_ARRAYS, "linear_cost"):
        assert np.array_equal(getattr(some, name), getattr(alone, name)), name
    assert np.array_equal(some.reached, some.tokens * ids.numel() // some.total_tokens)
    some.save(tmp_path / "some.safetensors")
    loaded = ExpertScores.load(tmp_path / "some.safetensors")
    assert loaded.all_tokens == ids.numel()
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


def test_texts_count_as_before_though_each_keeps_a_sequence(
    model_folder: Folder, text_file: Path, other_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 and 2 of 20 sequences; of 3 that are scored, 2 and 1."""
    monkeypatch.setattr(scored, "LEAST_SEQUENCES", 3)
    monkeypatch.setattr(scored, "SEQUENCES_OF_TEXT", 1)

    def recipe_of(first: float, **changes: Any) -> Recipe:
        texts = ((str(text_file), first), (str(other_text), 1.0))
        return small_recipe(text_file, "default", calib=texts, sequences=20, **changes)

    source = Source(model_folder())
    recipe = recipe_of(9.0, score_tokens=1)
    ids = calibration_ids(source, recipe)
    length = ids.shape[1]
    some = score(source, recipe, ids=ids)
    assert some.total_tokens == 3 * length and some.text_tokens == (18 * length, 2 * length)
    chosen = scored_sequences(20, [9, 1], 3)
    alone = score(source, recipe_of(2.0, score_tokens=0), ids=ids[chosen])
    for d, share in enumerate((18 / 20 / (2 / 3), 2 / 20 / (1 / 3))):
        np.testing.assert_allclose(some.cost[d], alone.cost[d] * share, rtol=1e-12)
        np.testing.assert_allclose(some.linear_cost[d], alone.linear_cost[d] * share, rtol=1e-12)
    # Over the worst text: losses per token of a text do not depend on how often it was scored.
    budget = {"over": "worst", "bits": 2.0}
    plans = [allocate(scores, scores.recipe_for(recipe, **budget)) for scores in (some, alone)]
    assert np.array_equal(plans[0].bits, plans[1].bits)


def test_scores_and_plans_of_before_were_measured_on_all_tokens(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(text_file, bits=2.0)
    scores = score(model_folder(), recipe)
    assert scores.recipe["score_tokens"] == 4096
    older = {k: v for k, v in scores.recipe.items() if k != "score_tokens"}
    dataclasses.replace(scores, recipe=older).save(tmp_path / "scores.safetensors")
    plan = allocate(ExpertScores.load(tmp_path / "scores.safetensors"))
    assert plan.recipe == recipe.with_changes(score_tokens=0)
    plan.save(tmp_path / "plan.json")
    fields = json.loads((tmp_path / "plan.json").read_text())
    del fields["recipe"]["score_tokens"]
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    assert BitAllocation.load(tmp_path / "plan.json").recipe == plan.recipe


def test_damaged_counts_of_tokens_are_refused_and_give_no_negative_ones(tmp_path: Path) -> None:
    whole = synthetic.scores(2, 4)
    path = tmp_path / "scores.safetensors"
    for fields in ({"text_tokens": (1 << 62,)}, {"total_tokens": 1 << 49}, {"text_tokens": (-1,)}):
        dataclasses.replace(whole, **fields).save(path)
        with pytest.raises(FileError, match="Score again"):
            ExpertScores.load(path)
    dataclasses.replace(whole, text_tokens=(1 << 48,), total_tokens=1).save(path)
    reached = ExpertScores.load(path).reached
    assert (reached >= whole.tokens).all()
    exact = [int(t) << 48 for t in whole.tokens.flat]
    assert reached.ravel().tolist() == [min(number, 1 << 62) for number in exact]


def test_the_report_shows_tokens_of_the_whole_calibration_set() -> None:
    whole = synthetic.subject(2, 4)
    assert whole.scores is not None
    half = dataclasses.replace(
        whole.scores, tokens=whole.scores.tokens // 2, total_tokens=whole.scores.total_tokens // 2
    )
    subject = dataclasses.replace(whole, scores=half)
    columns = dict(expert_values(subject)["columns"])
    assert columns["tokens"] == half.reached.ravel().tolist() != half.tokens.ravel().tolist()
    (text, *_) = coverage(subject).text
    assert f"Costs were measured on {half.total_tokens:,} of them" in text
    assert f"chosen by about {half.reached.min():,} to {half.reached.max():,}" in text
