"""A cache whose tensors keep sizes and addresses, for captured steps, filled from a growing one.

transformers' `generate` keeps its cache of growing length. A captured step works on a `FixedCache`
that was filled from it, and after the step the growing cache shows the first tokens of the fixed
tensors (shown_layers.py). So it is always whole: any other call can go on with it.

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
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from moepress.hf import shown_layers
from moepress.hf.growing_cache import GrowingLayer
from moepress.hf.shown_layers import Shown, ShownBoth, ShownWindow, ShownWindowBoth
from moepress.kernels import cache_write


class UnfitError(Exception):
    """A cache of a kind that cannot be fixed."""


class Position:
    """Where a step writes, for all layers of a cache: one number, on the host and on the device.

    Attributes:
        tokens: tokens before the step's.
        here: the same number [1] int64, on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens = 0
        self.here = torch.zeros(1, dtype=torch.int64, device=device)
        self._first: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    def move_to(self, tokens: int) -> None:
        self.tokens = tokens
        self.here.fill_(tokens)

    def move_on(self) -> None:
        """At the end of a step, on the device."""
        self._first.clear()
        self._seen.clear()
        self.here.add_(1)

    # Layers of one window take the same tensors: they are made once in a step.

    def first(self, window: int) -> Tensor:
        """The first token [] that a step sees in a window of so many, itself included."""
        if window not in self._first:
            self._first[window] = (self.here.view(()) - window + 1).clamp(min=0)
        return self._first[window]

    def seen(self, window: int) -> Tensor:
        """The tokens [window] of a window."""
        if window not in self._seen:
            places = torch.arange(window, device=self.here.device)
            self._seen[window] = places + self.first(window)
        return self._seen[window]


class FixedAttention(StaticLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values [1, heads, room, D] of one layer.

    `cumulative_length` [] is the number of tokens on the device, as in the base class. Unlike there
    it is that of all layers, and advances at the end of a step.
    """

    def __init__(self, like: DynamicLayer, room: int, position: Position) -> None:
        super().__init__(max_cache_len=room)
        if not like.is_initialized or like.keys.dim() != 4:
            raise UnfitError("a layer without keys")
        if like.get_seq_length() != position.tokens:
            raise UnfitError("layers with other numbers of tokens than others")
        self.is_sliding = like.is_sliding
        self.window = min(room, getattr(like, "sliding_window", room))
        self.device, self.dtype = like.keys.device, like.keys.dtype
        self.keys, self.values = (
            torch.zeros(
                *held.shape[:-2], room, held.shape[-1], dtype=held.dtype, device=held.device
            )
            for held in (like.keys, like.values)
        )
        self.position = position
        self.cumulative_length = position.here.view(())
        self.is_initialized = True

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.position.tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a token, and return those that it may see, and behind them room for others."""
        cache_write(self.keys, self.values, key_states, value_states, self.position.here)
        if self.window == self.max_cache_len:
            return self.keys, self.values
        seen = self.position.seen(self.window)
        return self.keys.index_select(2, seen), self.values.index_select(2, seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, Tensor | int]:
        whole = self.window == self.max_cache_len
        return self.window, 0 if whole else self.position.first(self.window)

    def load(self, layer: DynamicLayer) -> None:
        """Copy a growing layer's tokens, of a window the last ones."""
        self.part(layer)
        first = self.length - layer.keys.shape[-2]
        for own, held in ((self.keys, layer.keys), (self.values, layer.values)):
            own[..., :first, :].zero_()  # numbers of another text, if not finite, would spread
            own[..., first : self.length, :].copy_(held)
            own[..., self.length :, :].zero_()

    def show(self, layer: DynamicLayer) -> None:
        """Have a growing layer hold what is here, without a copy."""
        shown_layers.show(layer, self)

    def shows(self, layer: DynamicLayer) -> bool:
        """Whether nothing else has changed the layer since `show`."""
        return shown_layers.shows(layer, self)

    def agrees(self, layer: DynamicLayer) -> bool:
        """Whether a layer that holds tokens of its own has as many."""
        return bool(layer.get_seq_length() == self.length)

    def part(self, layer: DynamicLayer) -> None:
        """Have a layer that shows what is here hold a copy."""
        if self.shows(layer):
            shown_layers.release(layer)


class FixedState(LinearAttentionLayer):  # type: ignore[misc]
    """The states of a layer of linear attention, which transformers updates in place.

    A layer without any stays so: transformers 5.17 has this kind for those that keep nothing.
    """

    def __init__(self, like: LinearAttentionLayer, room: int, position: Position) -> None:
        super().__init__(number_of_states=like.number_of_states)
        known = set(like.has_previous_state.values())
        if len(known) > 1:
            raise UnfitError("a layer with some of its states")
        if known == {True}:
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

    def agrees(self, layer: LinearAttentionLayer) -> bool:
        return True

    def part(self, layer: LinearAttentionLayer) -> None:
        for name in STATES:
            held = getattr(layer, name)
            for index, own in getattr(self, name).items():
                if own is not None and held[index] is own:
                    held[index] = own.clone()


class FixedBoth(FixedState, FixedAttention):
    """A layer with keys, values and states."""

    def __init__(self, like: Any, room: int, position: Position) -> None:
        FixedAttention.__init__(self, like, room, position)
        FixedState.__init__(self, like, room, position)

    def load(self, layer: Any) -> None:
        FixedAttention.load(self, layer)
        FixedState.load(self, layer)

    def show(self, layer: Any) -> None:
        FixedAttention.show(self, layer)
        FixedState.show(self, layer)

    def shows(self, layer: Any) -> bool:
        return FixedAttention.shows(self, layer)

    def agrees(self, layer: Any) -> bool:
        return FixedAttention.agrees(self, layer)

    def part(self, layer: Any) -> None:
        FixedAttention.part(self, layer)
        FixedState.part(self, layer)


# The layer that keeps nothing; transformers 5.17 has none.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", object)


class FixedNothing(DummyLayer):  # type: ignore[misc]
    """A layer that keeps nothing."""

    def __init__(self, like: Any, room: int, position: Position) -> None:
        super().__init__()

    def load(self, layer: Any) -> None: ...
    def show(self, layer: Any) -> None: ...
    def part(self, layer: Any) -> None: ...
    def shows(self, layer: Any) -> bool:
        return True

    def agrees(self, layer: Any) -> bool:
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
    Shown: FixedAttention,
    ShownWindow: FixedAttention,
    LinearAttentionLayer: FixedState,
    LinearAttentionAndFullAttentionLayer: FixedBoth,
    LinearAttentionAndSlidingWindowAttentionLayer: FixedBoth,
    ShownBoth: FixedBoth,
    ShownWindowBoth: FixedBoth,
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
            self.position = Position(_device(like))
            self.position.move_to(tokens_in(like))
            layers = [KINDS[type(layer)](layer, room, self.position) for layer in like.layers]
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
        before = self._shows()
        if before is not None:
            for own, layer in zip(self.layers, before.layers, strict=True):
                own.part(layer)
        self._shown_by = None
        self.position.move_to(tokens_in(cache))
        for own, layer in zip(self.layers, cache.layers, strict=True):
            own.load(layer)

    def show(self, cache: DynamicCache) -> None:
        """Have a growing cache, the one that was loaded, hold what is here, without a copy.

        It stays so: `advance` shows it a token more.
        """
        if self._shows() is cache:
            return
        self._shown_by = weakref.ref(cache)
        for own, layer in zip(self.layers, cache.layers, strict=True):
            own.show(layer)

    def shows(self, cache: DynamicCache) -> bool:
        """Whether nothing else has changed the cache since `show` or `load`."""
        shown = self._shows() is cache
        return len(cache.layers) == len(self.layers) and all(
            own.shows(layer) if shown else own.agrees(layer)
            for own, layer in zip(self.layers, cache.layers, strict=True)
        )

    def _shows(self) -> DynamicCache | None:
        return None if self._shown_by is None else self._shown_by()

    def advance(self) -> None:
        """Count a token that a step has written."""
        self.position.tokens += 1


def _device(cache: DynamicCache) -> torch.device:
    """The device of a cache that holds something."""
    known = (getattr(layer, "device", None) for layer in cache.layers)
    return next((device for device in known if device is not None), torch.device("cpu"))


def tokens_in(cache: DynamicCache) -> int:
    """Tokens in a growing cache; 0 where no layer keeps tokens."""
    attention = [la for la in cache.layers if isinstance(la, DynamicLayer) and la.is_initialized]
    return max((int(layer.get_seq_length()) for layer in attention), default=0)


def bytes_of(cache: DynamicCache, room: int) -> int:
    """Bytes of the keys and values that a fixed cache like a growing one has."""
    held = [
        x
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.is_initialized
        for x in (layer.keys, layer.values)
    ]
    return sum(room * x[..., :1, :].numel() * x.element_size() for x in held)


def begun(cache: DynamicCache) -> bool:
    """Whether a growing cache holds tokens or states."""
    linear = [la for la in cache.layers if isinstance(la, LinearAttentionLayer)]
    return tokens_in(cache) > 0 or any(any(la.has_previous_state.values()) for la in linear)
