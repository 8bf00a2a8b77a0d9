"""Attention of one token on a CPU: the same attention, with the queries of a group as rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import StaticCache
from transformers.integrations import sdpa_attention

from moepress.hf.grouped_attention import group_queries
from tests.conftest import COMMON, make_model

HEADS, GROUPS = COMMON["num_attention_heads"], COMMON["num_key_value_heads"]
IDS = torch.arange(20)[None] + 3

pytestmark = pytest.mark.skipif(
    not hasattr(sdpa_attention, "pack_gqa"), reason="transformers does not pack queries"
)


class Queries(TorchFunctionMode):
    """Records the shape of the queries of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def decoded(model: Any, dtype: torch.dtype, **options: Any) -> tuple[Tensor, set[tuple[int, ...]]]:
    """Logits of the last of 20 tokens, given alone, and the shapes of its queries."""
    model = copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        cache = model(IDS[:, :-1], use_cache=True, **options).past_key_values
        with Queries() as queries:
            logits = model(IDS[:, -1:], past_key_values=cache).logits
    return logits[0, -1].float(), set(queries.shapes)


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_model("mixtral")


@pytest.fixture(scope="module")
def grouped(plain: Any) -> Any:
    model = copy.deepcopy(plain)
    group_queries(model)
    group_queries(model)  # adds nothing
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token_is_decoded_as_before(plain: Any, grouped: Any, dtype: torch.dtype) -> None:
    oracle = plain(IDS).logits[0, -1]
    before, ungrouped = decoded(plain, dtype)
    after, shapes = decoded(grouped, dtype)
    size = COMMON["hidden_size"] // HEADS
    assert ungrouped == {(1, HEADS, 1, size)}
    assert shapes == {(1, GROUPS, HEADS // GROUPS, size)}
    assert (after - oracle).abs().max() <= 2 * (before - oracle).abs().max() + 1e-6


def test_several_tokens_and_other_attention_are_left_alone(plain: Any, grouped: Any) -> None:
    with Queries() as queries, torch.inference_mode():
        logits = grouped(IDS).logits
        expected = plain(IDS).logits
    assert torch.equal(logits, expected)
    assert {shape[2] for shape in queries.shapes} == {IDS.shape[1]}
    eager = [copy.deepcopy(model) for model in (plain, grouped)]
    for model in eager:
        model.set_attn_implementation("eager")
    same = [decoded(model, torch.float32)[0] for model in eager]
    assert torch.equal(*same)


def test_a_static_cache_keeps_its_mask(plain: Any, grouped: Any) -> None:
    caches = [StaticCache(model.config, max_cache_len=32) for model in (plain, grouped)]
    same = [
        decoded(model, torch.float32, past_key_values=cache)[0]
        for model, cache in zip((plain, grouped), caches, strict=True)
    ]
    assert torch.equal(*same)
