"""Text that the model writes: most likely tokens first, then sampled ones; the seed decides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.errors import InputError
from moepress.hf.growing_cache import GrowingLayer
from moepress.original.source import Source
from moepress.recipe import Recipe
from moepress.text import samples
from moepress.text.windows import load_tokens
from moepress.work import calibration_ids
from tests.conftest import make_model
from tests.text.conftest import begins


def test_own_samples(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "BATCH", 3)  # batches that do not divide the count
    model = make_model("mixtral")
    model.generation_config.top_k = 1  # the model's own settings must not matter
    model.generation_config.eos_token_id = list(range(2, 384))
    made: list[str] = []

    def give() -> Any:
        made.append("once")
        return model

    before = torch.get_rng_state()
    tokens = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=0, model=give)
    assert torch.equal(torch.get_rng_state(), before)
    assert made == ["once"]
    assert tokens.ids.shape == (4, 12)
    assert tokens.texts == ("self",) * 4
    assert not set(tokens.ids[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert len(set(tokens.ids[:, 0].tolist())) > 1
    with torch.inference_mode():
        likely = model(input_ids=tokens.ids).logits.argmax(-1)[:, :-1]
    follows = likely == tokens.ids[:, 1:]
    assert follows[:, : samples.GREEDY_TOKENS].all()
    assert not follows[:, samples.GREEDY_TOKENS :].all(dim=1).any()  # the rest is sampled
    again = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=0, model=give)
    assert torch.equal(again.ids, tokens.ids)
    other = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=1, model=give)
    assert not torch.equal(other.ids, tokens.ids)


def test_own_samples_depend_on_neither_batches_nor_generators_of_the_process(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card has another generator; both draw with the numbers of the CPU."""
    model = make_model("mixtral")
    texts = []
    for batch in (64, 3):
        torch.manual_seed(batch)
        monkeypatch.setattr(samples, "BATCH", batch)
        tokens = load_tokens([("self", 1.0)], tokenizer, 4, 12, seed=0, model=lambda: model)
        texts.append(tokens.ids)
    assert torch.equal(*texts)


def test_the_cache_of_own_samples_has_room(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying all keys and values for each token took two fifths of the time."""
    recipe = Recipe.load("fast", sequences=2, sequence_length=9)
    updates, update = [], GrowingLayer.update

    def counted(layer: GrowingLayer, *states: Any, **options: Any) -> Any:
        updates.append(layer)
        return update(layer, *states, **options)

    monkeypatch.setattr(GrowingLayer, "update", counted)
    calibration_ids(Source(model_folder()), recipe)
    assert len(updates) > 9  # of each layer for each token behind the first


@pytest.mark.parametrize("length", [2, 3, 7])
def test_own_samples_may_be_short(tokenizer: Any, length: int) -> None:
    model = make_model("mixtral")
    tokens = load_tokens([("self", 1.0)], tokenizer, 2, length, seed=0, model=lambda: model)
    assert tokens.ids.shape == (2, length)


def test_own_samples_begin_as_the_tokenizer_begins_texts(tokenizer: Any) -> None:
    beginner = begins(tokenizer, "<s> $A")
    model = make_model("mixtral")
    for length in (2, 9):
        tokens = load_tokens([("self", 1.0)], beginner, 2, length, 0, model=lambda: model)
        assert tokens.ids.shape == (2, length)
        assert tokens.ids[:, 0].tolist() == [0, 0]


def test_own_samples_begin_with_tokens_that_the_model_knows(tokenizer: Any) -> None:
    model, more = make_model("mixtral"), copy.deepcopy(tokenizer)
    more.add_tokens([f"extra {number}" for number in range(2000)])
    ids = load_tokens([("self", 1.0)], more, 16, 3, 0, model=lambda: model).ids
    assert int(ids.max()) < model.config.vocab_size < max(more.get_vocab().values())


def test_own_samples_need_the_model(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"must fit in memory.*'stdlib'"):
        load_tokens([("self", 1.0)], tokenizer, 2, 8, 0)
