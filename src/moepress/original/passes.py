"""Bring a walk into a loop, with all its passes together, and out of it (loops.py).

A backward walk goes back through the passes one by one: the gradient at what a pass leaves to the
next one is known once the next one is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepress.original.batches import SHARE_IN_ORDER, empty
from moepress.original.carried import BLOCKS, PREVIOUS

if TYPE_CHECKING:
    from moepress.original.backward import Gradient
    from moepress.original.walk import Walk


def enter_loop(walk: Walk) -> None:
    """Go on with the states in front of each pass, the last pass first.

    What each pass leaves to the next is computed with the original layers.

    Args:
        walk: in front of the loop.
    """
    loop, run = walk.loop, walk.fork()
    before = _blocks(walk).shape[-2]
    left = [torch.zeros(0)]  # to each pass by the one before
    for number in range(loop.passes - 1):
        run.set_passes((number,))
        run.carried = dict(walk.carried)
        run.states.copy_(walk.states)
        if number:
            run.carried[PREVIOUS] = left[number]
        for layer in loop.layers:
            with walk.source.layer_loaded(layer):
                run.pass_layer(layer)
        left.append(_left_by_pass(run.states, _blocks(run), before))
    left[0] = torch.zeros_like(left[1])  # the first pass gets no messages: never read
    walk.set_passes(loop.together)
    walk.states = _stacked([walk.states] * loop.passes)
    walk.carried = {k: _stacked([v] * loop.passes) for k, v in walk.carried.items()}
    walk.carried[PREVIOUS] = _stacked([left[number] for number in loop.together])


def leave_loop(walk: Walk) -> None:
    """Go on with the states after the last pass.

    Args:
        walk: after the last layer of the loop.
    """
    last = slice(0, len(walk.ids))
    walk.set_passes((0,))
    walk.states = _stacked([walk.states[last]])
    kept = {name: value for name, value in walk.carried.items() if name != PREVIOUS}
    walk.carried = {name: _stacked([value[last]]) for name, value in kept.items()}


def passes_back(gradient: Gradient, passes: int) -> Iterator[int]:
    """The passes of a loop, the last one first.

    Args:
        gradient: after the loop. Whoever iterates brings it back through the layers of each pass.
            In the end it is the one in front of the loop.
        passes: 1: of layers that are in no loop.
    """
    states, carried = torch.zeros(0), dict[str, Tensor]()  # sums in front of the loop
    for number in reversed(range(passes)):
        yield number
        if passes == 1:
            return
        left = gradient.carried.pop(PREVIOUS, None)
        states = states + gradient.states if len(states) else gradient.states.clone()
        for name, value in gradient.carried.items():
            carried[name] = carried[name] + value if name in carried else value
        if number and len(gradient.states):  # else this rank has no sequences
            assert left is not None  # every pass after the first one gets messages
            gradient.states.copy_(left[..., -1, :])
            shape = list(left.shape)
            shape[-2] = gradient.carried[BLOCKS].shape[-2] + 1
            gradient.carried = {BLOCKS: torch.cat([left.new_zeros(shape), left[..., :-1, :]], -2)}
    gradient.states.copy_(states)
    gradient.carried = carried


def _blocks(walk: Walk) -> Tensor:
    """The blocks [S, L, blocks, H] that a walk carries; a rank without sequences carries none."""
    return walk.carried.get(BLOCKS, walk.states[..., None, :][..., :0, :])


def _left_by_pass(states: Tensor, blocks: Tensor, before: int) -> Tensor:
    """What a pass leaves to the next one: [S, L, blocks + 1, H].

    Args:
        states: [S, L, H] after the pass.
        blocks: [S, L, blocks, H] after the pass.
        before: number of blocks in front of the loop.
    """
    own = blocks[..., before + 1 :, :]  # without the states that every pass begins at
    found = _lasting((*own.shape[:2], own.shape[2] + 1, own.shape[3]), states)
    found[..., :-1, :] = own
    found[..., -1, :] = states
    return found


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [S, ...] behind each other: [parts * S, ...]."""
    count = len(parts[0])
    found = _lasting((len(parts) * count, *parts[0].shape[1:]), parts[0])
    for place, part in enumerate(parts):
        found[place * count : (place + 1) * count] = part
    return found


def _lasting(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor for values of all sequences."""
    with torch.inference_mode(False):  # a backward walk differentiates through them
        return empty(shape, like.dtype, like.device, SHARE_IN_ORDER)
