"""Record how a model calls its decoder layers, and run other code in place of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moepress.errors import InputError
from moepress.original.carried import Placeholder, stand_in_output, with_placeholders
from moepress.original.composite import decoder
from moepress.original.loops import loop_of, message_of

if TYPE_CHECKING:
    from moepress.original.source import Source


@dataclass(frozen=True)
class Call:
    """One call of a decoder layer by its model."""

    hidden: Tensor  # [b, L, ...] states before the layer; emptied once the call is recorded
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def without_hidden(self, like: Call) -> Call:
        """The call without its states, sharing every argument that equals the one of `like`."""
        args = tuple(_shared(a, b) for a, b in zip(self.args, like.args, strict=True))
        kwargs = {k: _shared(v, like.kwargs.get(k)) for k, v in self.kwargs.items()}
        return Call(self.hidden[:0], args, kwargs)

    def tensors(self) -> dict[int | str, Tensor]:
        """The arguments that are tensors, beside the states, by position or name."""
        places: tuple[int | str, ...] = (*range(len(self.args)), *self.kwargs)
        values = (*self.args, *self.kwargs.values())
        given = zip(places, values, strict=True)
        return {place: value for place, value in given if isinstance(value, Tensor)}

    def replaced(self, values: Mapping[int | str, Tensor]) -> Call:
        """The call with other values of some arguments, by position or name."""
        args = tuple(values.get(place, value) for place, value in enumerate(self.args))
        kwargs = {name: values.get(name, value) for name, value in self.kwargs.items()}
        return Call(self.hidden, args, kwargs)


def _shared(value: Any, like: Any) -> Any:
    """`like` if it equals `value`, else `value`: equal masks of many batches are kept once."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        return like if value.shape == like.shape and torch.equal(value, like) else value
    if isinstance(value, Placeholder) and value == like:
        return like
    if isinstance(value, tuple) and isinstance(like, tuple) and len(value) == len(like):
        return tuple(_shared(v, k) for v, k in zip(value, like, strict=True))
    return value


def record_calls(source: Source, ids: Tensor) -> list[Call]:
    """The calls of all layers for a batch of sequences [b, L], in order; no layer is run.

    Raises:
        InputError: the model calls its layers in another order than is known (`Loop.order`).
    """
    return record_layer_calls(decoder(source.model), source.layers, ids.to(source.device))


def record_layer_calls(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> list[Call]:
    """As `record_calls`, for the part of a model without the head."""
    calls: list[Call] = []
    loop = loop_of(model.config, len(layers))

    def keep(number: int) -> Callable[[Call], None]:
        def append(call: Call) -> None:
            again = number in numbers  # only layers of a loop are called again
            message = message_of(model, loop, number) if again and number in loop.layers else None
            args = with_placeholders(layers[number], call.args, message)
            calls.append(Call(call.hidden, args, call.kwargs))
            numbers.append(number)

        return append

    numbers: list[int] = []
    with replaced_forwards(layers, keep):
        model(input_ids=ids, use_cache=False)
    if numbers != loop.order(len(layers)):
        raise InputError(
            f"{type(model).__name__} calls its layers in the order {numbers}. Expected each "
            "layer once, in order, or a loop that its config tells: this model cannot be walked "
            "layer by layer."
        )
    return calls


@contextmanager
def replaced_forward(
    module: nn.Module | None, forward: Callable[..., Any] | None
) -> Iterator[None]:
    """Inside the `with` statement, calling `module` calls `forward`. None: nothing is replaced."""
    if module is None or forward is None:
        yield
        return
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the attribute of the instance; the class's method is used again


@contextmanager
def replaced_forwards(
    layers: nn.ModuleList, make: Callable[[int], Callable[[Call], Tensor | None]]
) -> Iterator[None]:
    """Inside the `with` statement, layer i passes its call to the function `make(i)`.

    That function returns the states after the layer; None: the unchanged states. What a layer
    returns beside them is a placeholder (carried.py).
    """

    def stand_in(layer: nn.Module, handle: Callable[[Call], Tensor | None]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = handle(Call(hidden_states, args, kwargs))
            return stand_in_output(layer, hidden_states if out is None else out)

        return forward

    for number, layer in enumerate(layers):
        layer.forward = stand_in(layer, make(number))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
