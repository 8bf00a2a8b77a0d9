"""A cache with room for more tokens: a new token is written behind the others.

transformers' cache of growing length copies all keys and values of a layer for every token
(torch.cat): 1 ms a layer at 4096 tokens of context and 8 heads of 128 numbers, as long as their
attention takes (docs/log.md#growing-cache). Attention reads the same numbers either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

LEAST_ROOM = 64  # tokens; a sixteenth of the tokens, if that is more


def grow_in_place(model: nn.Module) -> None:
    """Give the caches that a model gets room for more tokens, on a CPU. Safe to repeat."""
    if _give_room not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_give_room, with_kwargs=True)


def room_beyond(tokens: int) -> int:
    """Tokens that a cache of so many has room for beyond these."""
    return max(LEAST_ROOM, tokens // 16)


@dataclass(frozen=True, eq=False)
class _Room:
    at: Tensor  # [..., tokens and room for more, D]
    filled: int  # tokens

    @property
    def held(self) -> Tensor:
        return self.at[..., : self.filled, :]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer whose keys and values are the first tokens of longer tensors.

    Tokens are only written behind the last one, so keys and values that were returned stay as they
    are. After anything else has set them (crop, reorder), the next update copies them. Where
    gradients may be recorded or functions transformed, torch.cat makes them as ever.
    """

    keys: Tensor
    values: Tensor
    _rooms: tuple[_Room, _Room] | None = None  # of keys and values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not (_joins(self.keys, key_states) and _joins(self.values, value_states)):
            self._rooms = None
            result: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return result
        rooms = self._rooms or (None, None)
        keys = _appended(rooms[0], self.keys, key_states)
        values = _appended(rooms[1], self.values, value_states)
        self._rooms = keys, values
        self.keys, self.values = keys.held, values.held
        return self.keys, self.values

    # What replaces keys and values frees their tensors.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rooms = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rooms = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rooms = None
        super().batch_select_indices(indices)

    def reset(self) -> None:
        self._rooms = None
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: two layers must not write into one tensor."""
        return {name: value for name, value in vars(self).items() if name != "_rooms"}


def _give_room(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a model runs: the plain growing layers of its cache become `GrowingLayer`."""
    if torch.compiler.is_compiling():
        return
    for cache in kwargs.values():
        if isinstance(cache, Cache):
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = GrowingLayer


def _joins(held: Tensor, new: Tensor) -> bool:
    """Whether `new` can be written behind `held`. Else torch.cat does what it does."""
    seen = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    return (
        new.is_cpu
        and not seen
        and not torch.compiler.is_compiling()
        and new.dtype == held.dtype
        and (held.dim() == 1 or _sizes(held) == _sizes(new))
    )


def _sizes(x: Tensor) -> tuple[torch.Size, int]:
    return x.shape[:-2], x.shape[-1]


def _appended(room: _Room | None, held: Tensor, new: Tensor) -> _Room:
    """`held` and behind it `new`, in `room` if `held` is what fills it and there is place."""
    tokens = held.shape[-2] if held.dim() > 1 else 0
    end = tokens + new.shape[-2]
    if room is None or not _fills(held, room) or end > room.at.shape[-2]:
        shape = *new.shape[:-2], end + room_beyond(end), new.shape[-1]
        room = _Room(new.new_empty(shape), tokens)
        if tokens:
            room.held.copy_(held)
    room.at[..., tokens:end, :].copy_(new)
    return _Room(room.at, end)


def _fills(held: Tensor, room: _Room) -> bool:
    kept = room.held
    place = held.data_ptr(), held.shape, held.stride()
    # Tensors of inference mode cannot be written to outside of it.
    writable = torch.is_inference_mode_enabled() or not kept.is_inference()
    return writable and place == (kept.data_ptr(), kept.shape, kept.stride())
