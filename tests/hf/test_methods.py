"""Packed models answer what programs ask of a model: how large it is, and to be resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moepress.errors import InputError
from moepress.format.codec import PackedSpec
from tests.test_hf import IDS, choose_specs, pack_model, tiny


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, model) of a family whose head and embedding are packed, and the plain model."""
    model, folder = tiny(request.param), tmp_path_factory.mktemp(request.param)
    tables = {f"{name}.weight": PackedSpec((8,), 64) for name in ("model.embed_tokens", "lm_head")}
    specs = choose_specs(model) | tables
    if model.config.tie_word_embeddings:
        del specs["lm_head.weight"]
    pack_model(model, folder, specs)
    return folder, AutoModelForCausalLM.from_pretrained(folder), model


def test_parameters_are_those_of_the_model(pair: Any) -> None:
    _, packed, plain = pair
    assert packed.num_parameters() == plain.num_parameters()
    without = {"exclude_embeddings": True}
    assert packed.num_parameters(**without) == plain.num_parameters(**without)
    assert packed.num_parameters(only_trainable=True) == sum(
        one.numel() for one in packed.parameters() if one.requires_grad
    )
    stored = sum(one.nbytes for one in packed.parameters())
    assert (
        packed.get_memory_footprint(return_buffers=False) == stored < plain.get_memory_footprint()
    )


def test_resizing_to_the_size_it_has_does_nothing_and_others_are_refused(pair: Any) -> None:
    _, packed, _ = pair
    size = packed.config.vocab_size
    table, before = packed.get_input_embeddings(), packed(IDS).logits
    for asked in ((), (None,), (size,), (size - 3, 8), (None, 16)):
        assert packed.resize_token_embeddings(*asked) is table
    for asked in ((size + 8,), (size - 1,), (None, 250)):
        with pytest.raises(InputError, match=f"{size} tokens cannot become"):
            packed.resize_token_embeddings(*asked)
    assert torch.equal(packed(IDS).logits, before) and packed.config.vocab_size == size


def test_a_model_whose_tables_are_not_packed_is_resized(tmp_path: Path) -> None:
    model = tiny("mixtral")
    pack_model(model, tmp_path, choose_specs(model))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path)
    packed.resize_token_embeddings(packed.config.vocab_size + 8)
    assert packed(IDS).logits.shape[-1] == packed.config.vocab_size


def test_a_packed_head_is_left_aside(pair: Any) -> None:
    folder, packed, _ = pair
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with torch.no_grad():
        states = other.model(IDS).last_hidden_state
        assert torch.equal(states, packed.model(IDS).last_hidden_state)
        assert other(IDS).logits.shape == (1, 3)


def test_other_models_are_counted_as_before(pair: Any) -> None:
    plain = pair[2]
    assert plain.num_parameters() == sum(one.numel() for one in plain.parameters())
