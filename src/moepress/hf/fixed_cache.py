"""A cache whose tensors keep their sizes and addresses, for CUDA graphs, filled from a growing one.

transformers' `generate` keeps its cache of growing length. A captured step works on a `FixedCache`
that was filled from it, and after every step the growing cache shows the first tokens of the fixed
tensors. So it is always whole: any other call can go on with it.

A layer that looks at a window of the last tokens keeps all tokens here, and hands out those of the
window, wherever it is then. Not all models' masks would hide the tokens before it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from moepress.hf.growing_cache import GrowingLayer
from moepress.kernels import cache_write


class UnfitError(Exception):
    """A cache of a kind that cannot be fixed."""


class FixedAttention(StaticLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values [1, heads, room, D] of one layer.

    Attributes:
        length: tokens in it. `cumulative_length` is the same number on the device, which `update`
            reads and advances.
    """

    def __init__(self, like: DynamicLayer, room: int) -> None:
        super().__init__(max_cache_len=room)
        if not like.is_initialized or getattr(like, "record_past", False) or like.keys.dim() != 4:
            raise UnfitError("a layer without keys, or one that keeps more than its window")
        self.is_sliding = like.is_sliding
        self.window = min(room, getattr(like, "sliding_window", room))
        self.device, self.dtype = like.keys.device, like.keys.dtype
        self.keys, self.values = (
            torch.zeros(
                *held.shape[:-2], room, held.shape[-1], dtype=held.dtype, device=held.device
            )
            for held in (like.keys, like.values)
        )
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_initialized = True
        self.length = 0
        self.shown: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a token, and return those that it may see, and behind them room for others."""
        if self.window == self.max_cache_len:
            return self._written(key_states, value_states)
        seen = torch.arange(self.window, device=self.device) + self._before()
        keys, values = self._written(key_states, value_states)
        return keys.index_select(2, seen), values.index_select(2, seen)

    def _written(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values after `update` of the base class, by one kernel in place of five."""
        dtypes = key_states.dtype, value_states.dtype
        if key_states.shape[-2] == 1 and dtypes == (self.keys.dtype, self.values.dtype):
            cache_write(self.keys, self.values, key_states, value_states, self.cumulative_length)
            return self.keys, self.values
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return result

    def get_mask_sizes(self, query_length: int) -> tuple[int, Tensor | int]:
        whole = self.window == self.max_cache_len
        return self.window, 0 if whole else self._before()

    def _before(self) -> Tensor:
        """The position of the first token that the next one may see, on the device."""
        return (self.cumulative_length - self.window + 1).clamp(min=0)

    def load(self, layer: DynamicLayer) -> None:
        """Copy a growing layer's tokens, of a window the last ones."""
        self.length = layer.get_seq_length()
        self.shown = None
        first = self.length - layer.keys.shape[-2]
        for own, held in ((self.keys, layer.keys), (self.values, layer.values)):
            own[..., :first, :].zero_()  # numbers of another text, if not finite, would spread
            own[..., first : self.length, :].copy_(held)
            own[..., self.length :, :].zero_()
        self.cumulative_length.fill_(self.length)

    def show(self, layer: DynamicLayer) -> None:
        """Have a growing layer hold what is here, without a copy."""
        first = 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            first = max(0, self.length - layer.sliding_window + 1)
            layer.cumulative_length = self.length
        self.shown = (
            self.keys[..., first : self.length, :],
            self.values[..., first : self.length, :],
        )
        layer.keys, layer.values = self.shown

    def shows(self, layer: DynamicLayer) -> bool:
        """Whether nothing else has changed the layer since `show` or, without it, `load`."""
        mine = self.shown is None or (layer.keys is self.shown[0] and layer.values is self.shown[1])
        return mine and bool(layer.get_seq_length() == self.length)

    def part(self, layer: DynamicLayer) -> None:
        """Have a layer that shows what is here hold a copy."""
        if self.shown is not None and layer.keys is self.shown[0]:
            layer.keys = layer.keys.clone()
        if self.shown is not None and layer.values is self.shown[1]:
            layer.values = layer.values.clone()

    def advance(self) -> None:
        self.length += 1


class FixedState(LinearAttentionLayer):  # type: ignore[misc]
    """The states of a layer of linear attention, which transformers updates in place."""

    def __init__(self, like: LinearAttentionLayer, room: int) -> None:
        super().__init__(number_of_states=like.number_of_states)
        if not all(like.has_previous_state.values()) or like.record_past:
            raise UnfitError("a layer without states, or one that keeps past ones")
        self.device, self.dtype = like.device, like.dtype
        for name in ABOUT_STATES:
            setattr(self, name, dict(getattr(like, name)))
        for name in STATES:
            states = getattr(like, name).items()
            setattr(self, name, {i: None if s is None else torch.clone(s) for i, s in states})

    def load(self, layer: LinearAttentionLayer) -> None:
        """Copy a layer's states. If they are those here, the layer gets the copy.

        Else a step that is computed both ways would change them twice.
        """
        self.part(layer)
        for name in STATES:
            for index, own in getattr(self, name).items():
                if own is not None:
                    own.copy_(getattr(layer, name)[index])

    def show(self, layer: LinearAttentionLayer) -> None:
        for name in STATES:
            setattr(layer, name, dict(getattr(self, name)))

    def shows(self, layer: LinearAttentionLayer) -> bool:
        return True  # states are written in place, wherever they are

    def part(self, layer: LinearAttentionLayer) -> None:
        for name in STATES:
            held = getattr(layer, name)
            for index, own in getattr(self, name).items():
                if own is not None and held[index] is own:
                    held[index] = own.clone()

    def advance(self) -> None: ...


# The layer that keeps nothing; transformers 5.17 has none.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", object)


class FixedNothing(DummyLayer):  # type: ignore[misc]
    """A layer that keeps nothing."""

    def __init__(self, like: Any, room: int) -> None:
        super().__init__()

    def load(self, layer: Any) -> None: ...
    def show(self, layer: Any) -> None: ...
    def part(self, layer: Any) -> None: ...
    def advance(self) -> None: ...
    def shows(self, layer: Any) -> bool:
        return True


STATES = ("conv_states", "recurrent_states")
ABOUT_STATES = (
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)
Fixed = FixedAttention | FixedState | FixedNothing
KINDS: dict[type, type[Fixed]] = {  # classes derived from these may store more
    DynamicLayer: FixedAttention,
    GrowingLayer: FixedAttention,
    DynamicSlidingWindowLayer: FixedAttention,
    LinearAttentionLayer: FixedState,
    DummyLayer: FixedNothing,
}


class FixedCache(Cache):  # type: ignore[misc]
    """The cache of one sequence, with room for a fixed number of tokens.

    Args:
        like: the growing cache of a prompt that was computed.
        room: most tokens.

    Raises:
        UnfitError: a layer is of a kind that cannot be fixed.
    """

    def __init__(self, like: DynamicCache, room: int) -> None:
        unknown = sorted({type(la).__name__ for la in like.layers if type(la) not in KINDS})
        if unknown or not like.layers:
            raise UnfitError(f"its cache has layers of the kinds {unknown}")
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            layers = [KINDS[type(layer)](layer, room) for layer in like.layers]
        super().__init__(layers=layers)
        self.room = room
        self._shown_by: weakref.ref[DynamicCache] | None = None

    def alike(self, cache: DynamicCache) -> bool:
        """Whether `load` can take a growing cache."""
        return len(cache.layers) == len(self.layers) and all(
            KINDS.get(type(held)) is type(own)
            for own, held in zip(self.layers, cache.layers, strict=True)
        )

    def load(self, cache: DynamicCache) -> None:
        """Copy what a growing cache holds. One that showed what was here gets a copy of that."""
        before = None if self._shown_by is None else self._shown_by()
        if before is not None and before is not cache:
            for own, layer in zip(self.layers, before.layers, strict=True):
                own.part(layer)
        self._shown_by = None
        for own, layer in zip(self.layers, cache.layers, strict=True):
            own.load(layer)

    def show(self, cache: DynamicCache) -> None:
        """Have a growing cache, the one that was loaded, hold what is here, without a copy."""
        self._shown_by = weakref.ref(cache)
        for own, layer in zip(self.layers, cache.layers, strict=True):
            own.show(layer)

    def shows(self, cache: DynamicCache) -> bool:
        """Whether nothing else has changed the cache since `show` or `load`."""
        return all(o.shows(layer) for o, layer in zip(self.layers, cache.layers, strict=True))

    def advance(self) -> None:
        """Count a token that a step has written."""
        for layer in self.layers:
            layer.advance()


def tokens_in(cache: DynamicCache) -> int:
    """Tokens in a growing cache; 0 where no layer keeps tokens."""
    attention = [la for la in cache.layers if isinstance(la, DynamicLayer) and la.is_initialized]
    return max((int(layer.get_seq_length()) for layer in attention), default=0)


def begun(cache: DynamicCache) -> bool:
    """Whether a growing cache holds tokens or states."""
    linear = [la for la in cache.layers if isinstance(la, LinearAttentionLayer)]
    return tokens_in(cache) > 0 or any(any(la.has_previous_state.values()) for la in linear)
