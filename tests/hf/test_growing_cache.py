"""A cache with room for more tokens holds what transformers' own holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moepress.hf.grouped_attention import group_queries
from moepress.hf.growing_cache import LEAST_ROOM, GrowingLayer, grow_in_place
from tests.conftest import make_model


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def states(tokens: int, seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values of some tokens, [B, 2, T, 4] and [B, 2, T, 6], with strides of a model's."""
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, tokens, 2, width).transpose(1, 2) for width in (4, 6))


def both(steps: list[int]) -> tuple[DynamicLayer, GrowingLayer]:
    """Two layers after the same updates; what each update returned is compared at the end."""
    layers = DynamicLayer(), GrowingLayer()
    returned = [[layer.update(*states(n, i)) for i, n in enumerate(steps)] for layer in layers]
    for plain, ours in zip(*returned, strict=True):
        assert all(map(torch.equal, plain, ours))
    return layers


def same_after(plain: DynamicLayer, ours: GrowingLayer, tokens: int = 1) -> None:
    """Check one more update of both."""
    given = states(tokens, 99, len(plain.keys))
    assert all(map(torch.equal, plain.update(*given), ours.update(*given)))
    assert plain.get_seq_length() == ours.get_seq_length()


def test_updates_return_what_the_plain_layer_returns() -> None:
    _, ours = both([5, 1, 1, 3] + [1] * 2 * LEAST_ROOM)
    at = ours.keys.data_ptr()
    ours.update(*states(1, 7))
    assert ours.keys.data_ptr() == at  # nothing is copied
    assert not ours.keys.is_contiguous()


def test_what_others_set_is_kept() -> None:
    def crop(layer: DynamicLayer) -> None:
        layer.crop(-2)

    def reorder(layer: DynamicLayer) -> None:
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([1, 0]))

    for change in (crop, reorder, DynamicLayer.reset):
        plain, ours = both([4, 1, 1])
        before, kept = ours.keys, ours.keys.clone()
        change(plain)
        change(ours)
        if change is DynamicLayer.reset:  # it writes zeros, in some versions of transformers
            kept = before.clone()
        if change is not DynamicLayer.reset:
            same_after(plain, ours)
        else:
            assert all(map(torch.equal, plain.update(*states(3, 1)), ours.update(*states(3, 1))))
        same_after(plain, ours, tokens=3)
        assert torch.equal(before, kept)  # not written over


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_writes_into_tensors_of_its_own(copied: Any) -> None:
    plain, ours = both([4, 1])
    fork, plain_fork = copied(ours), copied(plain)
    ours.update(*states(1, 50))
    same_after(plain_fork, fork)
    plain.update(*states(1, 50))
    same_after(plain, ours)


def test_inference_mode_can_end() -> None:
    plain, ours = DynamicLayer(), GrowingLayer()
    with torch.inference_mode():
        for layer in (plain, ours):
            layer.update(*states(3, 0))
    same_after(plain, ours)


def test_autograd_gets_its_tensors() -> None:
    """Keys with a gradient, and keys without one beside queries that have one."""
    _, ours = both([3])
    with torch.enable_grad():
        leaf, query = (torch.randn(1, 2, 1, 4, requires_grad=True) for _ in range(2))
        before, _ = ours.update(*states(1, 0))
        product = (query * before).sum()
        keys, _ = ours.update(leaf, states(1, 1)[1])
        again, _ = ours.update(*states(1, 2))
        (product + keys.square().sum() + again.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, 4 * leaf.detach())
    torch.testing.assert_close(query.grad, before.sum(2, keepdim=True))


def test_function_transforms_see_torch_cat() -> None:
    before, (_, values) = states(3, 0), states(1, 1)

    def last(keys: Tensor) -> Tensor:
        layer = GrowingLayer()
        layer.update(*before)
        return layer.update(keys, values)[0]

    keys = torch.stack([states(1, seed)[0] for seed in (5, 6)])
    assert torch.equal(torch.vmap(last)(keys), torch.stack([last(one) for one in keys]))


def test_replaced_keys_free_their_room() -> None:
    for change in (
        lambda layer: layer.reorder_cache(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.reset(),
    ):
        _, ours = both([4, 1])
        assert ours._rooms is not None
        change(ours)
        assert ours._rooms is None


def test_values_of_no_width_keep_their_length() -> None:
    ours = GrowingLayer()
    for _ in range(3):
        _, values = ours.update(states(1, 0)[0], torch.empty(1, 2, 1, 0))
    assert values.shape == (1, 2, 3, 0)


def test_what_does_not_join_is_refused_as_before() -> None:
    _, ours = both([4])
    with pytest.raises(RuntimeError):
        ours.update(*states(1, 0, batch=2))


def test_a_model_writes_the_same_text() -> None:
    model = make_model("mixtral")
    ids = torch.arange(20)[None] + 3
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    beams = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2)
    grow_in_place(model)
    grow_in_place(model)
    assert len(model._forward_pre_hooks) == 1
    cache = DynamicCache(config=model.config)
    got = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}
    assert torch.equal(got, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2), beams)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_gives_the_same_bits(dtype: torch.dtype) -> None:
    """After 300 tokens of context: keys with room have other strides."""
    model = make_model("mixtral").to(dtype)
    group_queries(model)
    heads = model.config.num_key_value_heads
    width = model.config.hidden_size // model.config.num_attention_heads

    def logits() -> Tensor:
        cache = DynamicCache(config=model.config)
        torch.manual_seed(0)
        for layer in range(model.config.num_hidden_layers):
            cache.update(*(torch.randn(1, heads, 300, width).to(dtype) for _ in "kv"), layer)
        with torch.inference_mode():
            found = [model(torch.tensor([[token]]), past_key_values=cache) for token in range(8)]
        kinds.append({type(layer) for layer in cache.layers})
        return torch.cat([output.logits for output in found])

    kinds: list[set[type]] = []
    expected = logits()
    grow_in_place(model)
    assert torch.equal(logits(), expected)
    assert kinds == [{DynamicLayer}, {GrowingLayer}]
