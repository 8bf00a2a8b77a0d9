"""Bytes of what a walk holds of each token between layers: states, and carried values.

They follow from the shapes that each layer returns. No weight is read: the layers run on the meta
device, which computes shapes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moepress.blocks.form import is_experts
from moepress.original.calls import Call, replaced_forward
from moepress.original.carried import BOUNDARY, Carried, CarriedCall
from moepress.original.loops import loop_of
from moepress.original.source import Source
from moepress.original.usable import calls_without_weights


def bytes_between_layers(source: Source, length: int) -> tuple[int, ...]:
    """Bytes for one token before each layer, then after the last one.

    A layer whose code needs real numbers to run counts as one that carries nothing.

    Args:
        length: tokens of a sequence. Some layers hand on indices of other tokens.
    """
    calls = calls_without_weights(source, length)
    loop = loop_of(source.text_config, len(source.layers))
    states = calls[0].hidden.to("meta", source.compute_dtype)
    carried: Carried = {}
    sizes = [states.nbytes]
    for number, layer in enumerate(source.layers):
        try:
            states, carried = _run(layer, calls[loop.call(number, 0)], states, carried)
        except Exception:  # the model's own code, which may raise anything
            carried = {}
        sizes.append(states.nbytes + sum(value.nbytes for value in carried.values()))
    # In a loop, the states of all passes, and what each pass has left: blocks, and last states.
    left = sum(bool(getattr(source.layers[number], BOUNDARY, False)) for number in loop.layers)
    for number in loop.layers:
        sizes[number] = loop.passes * (sizes[number] + left * states.nbytes)
    return tuple(size // length for size in sizes)


@torch.no_grad()
def _run(layer: Any, call: Call, states: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """A layer on the meta device, without its routed experts."""
    kwargs = {name: _on_meta(value) for name, value in call.kwargs.items()}
    run = CarriedCall(tuple(map(_on_meta, call.args)), kwargs, states, carried)
    with ExitStack() as stack:
        stack.enter_context(_buffers_on_meta(layer))
        for module in layer.modules():
            if is_experts(module):
                stack.enter_context(replaced_forward(module, _no_experts))
        return run.run(layer)


def _no_experts(states: Tensor, *choices: Tensor) -> Tensor:
    return torch.empty_like(states)


@contextmanager
def _buffers_on_meta(layer: nn.Module) -> Iterator[None]:
    """Inside the `with` statement, all buffers of a layer are on the meta device."""
    real = [
        (module, name, buffer)
        for module in layer.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for module, name, buffer in real:
        module._buffers[name] = buffer.to("meta")
    try:
        yield
    finally:
        for module, name, buffer in real:
            module._buffers[name] = buffer


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return tuple(map(_on_meta, value)) if isinstance(value, tuple) else value
