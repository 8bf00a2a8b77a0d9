"""Layers that show tokens which lie elsewhere behave as transformers' own that hold them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from moepress.hf.growing_cache import GrowingLayer
from moepress.hf.shown_layers import Shown, release, show, shows

ROOM, TOKENS, WINDOW = 12, 7, 5
MAKERS: tuple[Callable[[], DynamicLayer], ...] = (
    DynamicLayer,
    GrowingLayer,
    lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW),
    lambda: DynamicSlidingWindowLayer(sliding_window=ROOM),
    LinearAttentionAndFullAttentionLayer,
    lambda: LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=WINDOW),
)


@dataclass
class Place:
    keys: Tensor
    values: Tensor
    length: int


def pair(make: Callable[[], DynamicLayer]) -> tuple[DynamicLayer, DynamicLayer, Place]:
    """A layer that shows a place, and one that was filled with the same tokens."""
    generator = torch.Generator().manual_seed(1)
    place = Place(*(torch.randn(1, 2, ROOM, 4, generator=generator) for _ in range(2)), TOKENS)
    shown, plain = make(), make()
    shown.update(place.keys[..., :2, :], place.values[..., :2, :])
    for at in range(TOKENS):  # one by one: a window forgets
        plain.update(place.keys[..., at : at + 1, :], place.values[..., at : at + 1, :])
    show(shown, place)
    return shown, plain, place


def same(found: DynamicLayer, expected: DynamicLayer) -> bool:
    return (
        torch.equal(found.keys, expected.keys)
        and torch.equal(found.values, expected.values)
        and found.get_seq_length() == expected.get_seq_length()
        and found.get_mask_sizes(3) == expected.get_mask_sizes(3)
    )


@pytest.fixture(params=range(len(MAKERS)))
def make(request: pytest.FixtureRequest) -> Callable[[], DynamicLayer]:
    return MAKERS[request.param]


def test_it_shows_what_is_there(make: Callable[[], DynamicLayer]) -> None:
    shown, plain, place = pair(make)
    assert shows(shown, place) and not shows(plain, place)
    place.length += 1  # a step has written a token
    plain.update(place.keys[..., TOKENS : TOKENS + 1, :], place.values[..., TOKENS : TOKENS + 1, :])
    assert shown.get_seq_length() == TOKENS + 1
    assert shows(shown, place)  # what is asked for every token copies nothing
    assert same(shown, plain)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_who_reads_it_gets_a_copy(make: Callable[[], DynamicLayer], name: str) -> None:
    shown, plain, place = pair(make)
    read = getattr(shown, name)
    assert torch.equal(read, getattr(plain, name)) and getattr(shown, name) is read
    assert type(shown) is type(plain) and not shows(shown, place)
    place.keys.fill_(9)  # another text
    place.values.fill_(9)
    assert torch.equal(read, getattr(plain, name)) and same(shown, plain)
    read.neg_()
    getattr(plain, name).neg_()
    assert same(shown, plain)


def changes(layer: DynamicLayer, name: str) -> Any:
    """What a change returns."""
    new = torch.ones(1, 2, 2, 4)
    return {
        "update": lambda: layer.update(new, 2 * new),
        "keys": lambda: setattr(layer, "keys", layer.keys + 1),
        "reorder": lambda: layer.reorder_cache(torch.tensor([0])),
        "repeat": lambda: layer.batch_repeat_interleave(2),
        "crop": lambda: layer.crop(-2),
    }[name]()


@pytest.mark.parametrize("name", ["update", "keys", "reorder", "repeat", "crop"])
def test_who_changes_it_gets_a_copy(make: Callable[[], DynamicLayer], name: str) -> None:
    shown, plain, place = pair(make)
    full = plain.is_sliding and plain.sliding_window <= TOKENS
    if name == "crop" and (full or hasattr(plain, "conv_states")):
        pytest.skip("transformers refuses to crop full windows and states")
    changes(shown, name)
    changes(plain, name)
    assert same(shown, plain) and type(shown) is type(plain)
    place.keys.fill_(9)  # another text
    place.values.fill_(9)
    assert same(shown, plain)
    if name != "repeat":
        returned = changes(shown, "update"), changes(plain, "update")
        assert all(torch.equal(one, other) for one, other in zip(*returned, strict=True))
        assert same(shown, plain)


def test_release(make: Callable[[], DynamicLayer]) -> None:
    shown, plain, place = pair(make)
    release(shown)
    release(plain)
    place.keys.fill_(9)
    assert same(shown, plain) and type(shown) is type(plain) and not shows(shown, place)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copies_have_tensors_of_their_own(
    make: Callable[[], DynamicLayer], copied: Callable[[Any], Any]
) -> None:
    shown, plain, place = pair(make)
    other = copied(shown)
    assert isinstance(shown, Shown) and type(other) is type(plain)
    place.keys.fill_(9)
    place.values.fill_(9)
    assert same(other, plain) and not same(shown, plain)


def test_pickles(make: Callable[[], DynamicLayer]) -> None:
    shown, plain, _ = pair(make)
    assert same(pickle.loads(pickle.dumps(shown)), plain)
