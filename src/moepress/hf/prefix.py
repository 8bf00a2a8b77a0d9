"""The cache of a text's first tokens, out of the cache of a longer text.

A prompt often begins as an earlier text did: with the same system message, with the conversation so
far. What the model keeps of these tokens need not be computed again.

Layers of full attention keep every token: the first ones are a view. A layer with a window forgets
tokens, and one of linear attention keeps one state of all: these can only go back to a `Mark`, a
place at which what they held was put aside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from moepress.hf.fixed_cache import ABOUT_STATES, KINDS, STATES

KNOWN = {*KINDS, DynamicIndexedLayer}  # classes derived from these may store more
BY_LENGTH = {"dynamic", "longrope"}  # rotary embeddings that depend on the length of the whole text
FORGETFUL = (DynamicSlidingWindowLayer, LinearAttentionLayer)
GAIN = 16  # tokens that another text must have in common
# A chat template ends a prompt with a few tokens that the conversation may not have later (that the
# answer begins, or thinks). A model that forgets gets a mark before these.
TAIL = 16
MARKED = 128  # tokens of the shortest prompt that is computed in two parts for a mark


@dataclass(frozen=True)
class Mark:
    """What the layers that forget held at one place of a text."""

    tokens: int
    layers: Mapping[int, Any]  # by their numbers


@dataclass(eq=False)
class Text:
    """What a model keeps of a text."""

    cache: Any
    ids: list[int] = field(default_factory=list)  # tokens in the cache
    marks: tuple[Mark, ...] = ()

    def reach(self, ids: list[int]) -> int:
        """How many first tokens of another text `beginning` can give; 0: none."""
        return reach(self.cache, len(self.ids), self.marks, common(self.ids, ids))

    def beginning(self, first: int) -> Text:
        """The text of so many first tokens, a result of `reach`. This one stays as it is."""
        return Text(
            prefix(self.cache, len(self.ids), self.marks, first),
            self.ids[:first],
            tuple(mark for mark in self.marks if mark.tokens <= first),
        )


def divisible(cache: Any, config: Any) -> bool:
    """Whether the first tokens of a cache are those of a shorter text.

    Args:
        cache: of transformers.
        config: of the language model.
    """
    known = type(cache) is DynamicCache and all(type(layer) in KNOWN for layer in cache.layers)
    return known and bool(cache.layers) and not BY_LENGTH & set(_rope_types(config))


def forgets(cache: DynamicCache) -> bool:
    """Whether a layer may be unable to give the first tokens of a longer text."""
    return any(isinstance(layer, FORGETFUL) for layer in cache.layers)


def place_of_mark(tokens: int) -> int:
    """Where a prompt of so many tokens gets a mark; 0: nowhere."""
    return tokens - TAIL if tokens >= MARKED else 0


def marked(cache: DynamicCache, tokens: int) -> Mark:
    """A mark at the end of what a cache holds now, which is so many tokens."""
    forgetful = {i: la for i, la in enumerate(cache.layers) if isinstance(la, FORGETFUL)}
    return Mark(tokens, {i: _first(layer, tokens, tokens) for i, layer in forgetful.items()})


def reach(cache: DynamicCache, tokens: int, marks: Sequence[Mark], wanted: int) -> int:
    """The largest number of first tokens up to `wanted` that `prefix` can give; 0: none.

    Args:
        cache: of `tokens` tokens.
        marks: made of this cache.
    """
    if wanted >= tokens or not any(map(_has_lost, cache.layers)):
        return min(wanted, tokens)
    return max((mark.tokens for mark in marks if mark.tokens <= wanted), default=0)


def prefix(cache: DynamicCache, tokens: int, marks: Sequence[Mark], first: int) -> DynamicCache:
    """A cache of the first tokens of another one, which stays as it is.

    Keys and values may be views of the other's. Neither cache writes into what it has handed out.

    Args:
        cache, marks: of `reach`.
        first: tokens; a result of `reach`.
    """
    mark = next((mark for mark in marks if mark.tokens == first), None)
    kept: Mapping[int, Any] = {} if mark is None or first == tokens else mark.layers
    made = copy.copy(cache)
    made.layers = [
        _first(kept[i], first, first) if i in kept else _first(layer, first, tokens)
        for i, layer in enumerate(cache.layers)
    ]
    return made


def _first(layer: Any, first: int, tokens: int) -> Any:
    """A layer with the first of a layer's tokens."""
    made = copy.copy(layer)  # a growing layer's copy makes room of its own
    if isinstance(layer, LinearAttentionLayer):  # written in place
        for name in STATES:
            states = getattr(layer, name).items()
            setattr(made, name, {i: None if x is None else x.clone() for i, x in states})
        for name in ABOUT_STATES:
            setattr(made, name, dict(getattr(layer, name)))
    if isinstance(made, DynamicLayer) and made.is_initialized and first < tokens:
        made.keys, made.values = (x[..., :first, :] for x in (made.keys, made.values))
        if isinstance(made, DynamicSlidingWindowLayer):
            made.cumulative_length = first
        if isinstance(made, DynamicIndexedLayer):
            if made.is_indexer_initialized:
                made.indexer_keys = made.indexer_keys[:, :first]
            if getattr(made, "indexer_position_ids", None) is not None:  # transformers 5.24 on
                made.indexer_position_ids = made.indexer_position_ids[..., :first]
    return made


def _has_lost(layer: Any) -> bool:
    """Whether a layer cannot give the first of its tokens."""
    if isinstance(layer, LinearAttentionLayer):
        return True
    window = isinstance(layer, DynamicSlidingWindowLayer)
    return window and layer.get_seq_length() >= layer.sliding_window


def _rope_types(config: Any) -> Iterator[str]:
    """The kinds of a model's rotary embeddings: one, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    for one in (found, *found.values()):
        if isinstance(one, dict):
            yield str(one.get("rope_type", "default"))


def common(one: list[int], other: list[int]) -> int:
    """How many first tokens two texts have in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared without a loop in Python
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
