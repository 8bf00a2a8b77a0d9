"""Whether a layer computes the same with other weights: asked of the layer, not of its code.

Where weights are multiplied by powers of two here and divided by them there, products are exact, so
a layer that computes the same gives the same numbers, bit by bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from moepress.original.calls import replaced_forward
from moepress.original.source import Source
from moepress.original.walk import Walk

T = TypeVar("T", bound=Hashable)


def powers_of_two(like: Tensor, power: int = 2) -> Tensor:
    """1 or a power of two, drawn for each channel, of a shape, dtype and device.

    The same on all machines. None is less than 1: so a norm's w + 1 times it, less 1, is exact.
    """
    generator = torch.Generator().manual_seed(like.numel())
    ones = torch.ones(like.shape)
    return torch.where(torch.rand(like.shape, generator=generator) < 0.5, ones, power).to(like)


def that_hold(
    walk: Walk, layer: int, before: Sequence[Tensor], changes: Mapping[T, Mapping[str, Tensor]]
) -> list[T]:
    """Those changes of a loaded layer with which it gives a batch the same, bit by bit.

    They are tried together first, which takes one run if all hold. The layer is left as it was.

    Args:
        before: what the layer gives now, of `run_batch`.
        changes: tensors by name, no tensor twice.
    """

    def hold(some: Sequence[T]) -> bool:
        tensors = {name: value for one in some for name, value in changes[one].items()}
        kept = {name: walk.source.current(name) for name in tensors}
        put(walk.source, tensors)
        after = run_batch(walk, layer, 0)
        put(walk.source, kept)
        return all(map(torch.equal, before, after))

    every = list(changes)
    if not every or hold(every):
        return every
    return [one for one in every if len(every) > 1 and hold([one])]


def put(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the skeleton, by name."""
    for name, value in tensors.items():
        source.put(name, value)


def run_batch(walk: Walk, layer: int, number: int) -> list[Tensor]:
    """All that a batch of this rank gets from a layer; last the inputs of its experts, if any.

    In place of the experts' outputs it gets their inputs.
    """
    given: list[Tensor] = []

    def give(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        given.extend((weight, index, x))
        return x

    batch = walk.batches[number]
    experts = walk.experts_module(layer) if layer in walk.source.experts else None
    with replaced_forward(experts, give):
        carried = walk.carried_of(batch)
        states, handed_on = walk.run(layer, number, walk.states_of(batch), carried)
    return [states, *handed_on.values(), *given]
