"""A cache with room for more tokens holds what transformers' own holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moepress.hf.growing_cache import LEAST_ROOM, GrowingLayer, grow_in_place
from tests.conftest import make_model


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


def test_inference_mode_can_end_and_autograd_gets_its_tensors() -> None:
    plain, ours = DynamicLayer(), GrowingLayer()
    with torch.inference_mode():
        for layer in (plain, ours):
            layer.update(*states(3, 0))
    same_after(plain, ours)
    leaf = torch.randn(1, 2, 1, 4, requires_grad=True)
    keys, _ = ours.update(leaf, states(1, 1)[1])
    again, _ = ours.update(*states(1, 2))
    (keys.square().sum() + again.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, 4 * leaf.detach())


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
