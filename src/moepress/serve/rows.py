"""One step of several sequences that each keep a cache of their own.

Sequences join and leave a batch at any step, and their lengths differ. `Rows` is a cache of
transformers that holds none of their keys and values: it stores what a layer computes in each
sequence's own cache, and returns that layer's keys and values of all sequences, padded on the left
to the longest, as `generate` pads them. The padded copy lives as long as the layer's call, so the
memory that stays is that of the sequences' own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from moepress.hf.fixed_cache import ABOUT_STATES, STATES, DummyLayer
from moepress.hf.growing_cache import GrowingLayer
from moepress.hf.shown_layers import Shown, ShownWindow


class Rows(Cache):  # type: ignore[misc]  # transformers is untyped
    """The caches of B sequences as one cache, for one new token of each.

    Args:
        caches: of the sequences; `can_batch` holds for each.
        lengths: tokens in each cache.
    """

    def __init__(self, caches: Sequence[Any], lengths: Sequence[int]) -> None:
        longest = max(lengths)
        layers = [
            KINDS[type(own[0])](own, longest)
            for own in zip(*(cache.layers for cache in caches), strict=True)
        ]
        super().__init__(layers=layers)

    def give_back(self) -> None:
        """After the step: store in the sequences' caches what is not stored there yet."""
        for layer in self.layers:
            if isinstance(layer, _LinearRows):
                layer.give_back()


class _FullRows(DynamicLayer):  # type: ignore[misc]
    """A layer of softmax attention over all tokens."""

    def __init__(self, own: Sequence[Any], longest: int) -> None:
        super().__init__()
        self.own = own
        self.longest = longest

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pairs = [
            layer.update(keys[row : row + 1], values[row : row + 1])
            for row, layer in enumerate(self.own)
        ]
        return _stacked([pair[0] for pair in pairs]), _stacked([pair[1] for pair in pairs])

    def get_seq_length(self) -> int:
        return self.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.longest + query_length, 0


class _SlidingRows(_FullRows):
    """A layer of softmax attention over the last tokens."""

    is_sliding = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.longest - self.own[0].sliding_window + 1, 0)
        return self.longest + query_length - offset, offset


class _LinearRows(LinearAttentionLayer):  # type: ignore[misc]
    """A layer whose state has one size whatever the number of tokens."""

    def __init__(self, own: Sequence[Any], longest: int) -> None:
        first = own[0]
        super().__init__(number_of_states=first.number_of_states)
        self.own = own
        self.device, self.dtype = first.device, first.dtype
        for name in STATES:
            states = getattr(self, name)
            for index, state in getattr(first, name).items():
                if state is not None:
                    states[index] = torch.cat([getattr(layer, name)[index] for layer in own])
        for name in ABOUT_STATES:
            setattr(self, name, dict(getattr(first, name)))

    def give_back(self) -> None:
        for name in STATES:
            for index, state in getattr(self, name).items():
                if state is not None:
                    for layer, row in zip(self.own, state.split(1), strict=True):
                        getattr(layer, name)[index].copy_(row)


KINDS: dict[type, Any] = {
    DynamicLayer: _FullRows,
    GrowingLayer: _FullRows,
    DynamicSlidingWindowLayer: _SlidingRows,
    Shown: _FullRows,
    ShownWindow: _SlidingRows,
    LinearAttentionLayer: _LinearRows,
    DummyLayer: lambda own, longest: DummyLayer(),
}


def can_batch(cache: Any) -> bool:
    """Whether `Rows` knows every layer of a cache. Classes derived from those may store more."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in KINDS for layer in layers)


def nbytes(cache: Any) -> int:
    """Bytes of the tensors of a cache."""
    layers = getattr(cache, "layers", ())
    held = [value for layer in layers for value in vars(layer).values()]
    held += [inner for value in held if isinstance(value, dict) for inner in value.values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """[1, heads, T_i, D] of every row, padded on the left with zeros: [B, heads, max T, D]."""
    longest = max(row.shape[2] for row in rows)
    if all(row.shape[2] == longest for row in rows):
        return torch.cat(list(rows))
    _, heads, _, width = rows[0].shape
    out = rows[0].new_zeros((len(rows), heads, longest, width))
    for place, row in zip(out, rows, strict=True):
        place[:, longest - row.shape[2] :] = row[0]
    return out
