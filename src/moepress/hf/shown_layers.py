"""Layers of transformers' growing cache that show tokens which lie elsewhere, without a copy.

After a replayed step the growing cache has to be whole: any other call may go on with it, and
anyone may read it. To write that into every layer for every token would take longer than all else
that Python does for the token. So a layer gets another class for the time: one that knows where its
tokens lie. Whoever reads or sets its keys and values, as `update` and `crop` do, gets a layer of
the former class with tensors of its own: what was read stays as it is, whatever comes next.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class Place(Protocol):
    """Where the tokens lie."""

    keys: Tensor  # [1, heads, room, D]
    values: Tensor

    @property
    def length(self) -> int: ...


class Shown(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer that shows all tokens of a place."""

    _place: Place
    _former: type[DynamicLayer]

    def _first(self) -> int:
        """The first token that the layer holds."""
        return 0

    def _copy(self, held: Tensor) -> Tensor:
        """Of keys or values of the place, those that the layer holds."""
        return held[..., self._first() : self._place.length, :].clone()

    @property
    def keys(self) -> Tensor:
        release(self)
        return self.keys  # its class is the former one

    @keys.setter
    def keys(self, value: Tensor) -> None:
        release(self)
        self.keys = value

    @property
    def values(self) -> Tensor:
        release(self)
        return self.values

    @values.setter
    def values(self, value: Tensor) -> None:
        release(self)
        self.values = value

    def get_seq_length(self) -> int:
        return self._place.length

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: those of a layer with tensors of its own."""
        return _layer, (self._former, _own_fields(self))


class ShownWindow(Shown, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that shows the last tokens of a place."""

    sliding_window: int

    def _first(self) -> int:
        return max(0, self._place.length - self.sliding_window + 1)

    @property
    def cumulative_length(self) -> int:
        return self._place.length

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        release(self)
        self.cumulative_length = value


class ShownBoth(Shown, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer that shows all tokens of a place, and has states of its own."""


class ShownWindowBoth(ShownWindow, LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """A layer that shows the last tokens of a place, and has states of its own."""


def show(layer: DynamicLayer, place: Place) -> None:
    """Have a growing layer show what lies in a place, from now on."""
    fields = layer.__dict__
    if isinstance(layer, Shown):
        fields["_place"] = place
        return
    for name in ("keys", "values", "cumulative_length", "_rooms"):
        fields.pop(name, None)
    fields |= {"_place": place, "_former": type(layer)}
    window, states = isinstance(layer, DynamicSlidingWindowLayer), hasattr(layer, "conv_states")
    layer.__class__ = SHOWN[window, states]


SHOWN = {  # whether a layer keeps a window, and states
    (False, False): Shown,
    (True, False): ShownWindow,
    (False, True): ShownBoth,
    (True, True): ShownWindowBoth,
}


def shows(layer: DynamicLayer, place: Place) -> bool:
    return vars(layer).get("_place") is place


def release(layer: DynamicLayer) -> None:
    """Have a layer hold a copy of what it shows; nothing happens to others."""
    if isinstance(layer, Shown):
        fields, former = _own_fields(layer), layer._former
        layer.__dict__.clear()
        layer.__class__ = former
        layer.__dict__.update(fields)


def _layer(kind: type[DynamicLayer], fields: dict[str, Any]) -> DynamicLayer:
    layer: DynamicLayer = object.__new__(kind)
    layer.__dict__.update(fields)
    return layer


def _own_fields(layer: Shown) -> dict[str, Any]:
    """The fields of a layer of the former class, with a copy of the tokens."""
    fields = {name: v for name, v in vars(layer).items() if name not in ("_place", "_former")}
    place = layer._place
    fields |= {"keys": layer._copy(place.keys), "values": layer._copy(place.values)}
    if isinstance(layer, ShownWindow):
        fields["cumulative_length"] = layer.cumulative_length
    return fields
