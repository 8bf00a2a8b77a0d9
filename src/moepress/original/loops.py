"""Layers that a model runs several times, one pass after the other (inkling2_loop).

Every pass begins at the states in front of the loop. From the second pass on, the layers also get
messages, which the model makes of what the pass before has left: its blocks and its last states.

A walk brings all passes through a layer of the loop together, as if they were more sequences. So
whatever is measured of a layer's inputs is measured of all passes. To begin with them together, the
walk first runs all passes but the last one by one (passes.py): with the original layers, because
those of the loop are not rounded yet. The last pass is the first one among the sequences:
linears that have the same inputs in the first pass only are told apart by the first batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Message = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loop:
    """The layers `start` .. `stop - 1` run `passes` times. A model without a loop has one pass."""

    start: int
    stop: int
    passes: int

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)

    def runs(self, layer: int) -> int:
        """How often the model runs a layer."""
        return self.passes if layer in self.layers else 1

    @property
    def together(self) -> tuple[int, ...]:
        """The passes in the order in which a walk has them among its sequences."""
        return tuple(reversed(range(self.passes)))

    def order(self, layers: int) -> list[int]:
        """The layers in the order of the model's calls.

        Args:
            layers: their number.
        """
        looped = list(self.layers)
        return [*range(self.start), *looped * self.passes, *range(self.stop, layers)]

    def call(self, layer: int, number: int) -> int:
        """Place of a layer's call in pass `number` among the model's calls."""
        before = number if layer in self.layers else self.passes - 1 if layer >= self.stop else 0
        return layer + before * len(self.layers)

    def groups(self, layers: Sequence[int]) -> list[list[int]]:
        """Layers in groups that a backward walk finishes together: those of the loop, any other."""
        found: list[list[int]] = []
        for layer in layers:
            if found and layer in self.layers and found[-1][0] in self.layers:
                found[-1].append(layer)
            else:
                found.append([layer])
        return found

    def whole(self, layers: Sequence[int]) -> list[int]:
        """Layers, with all of the loop if one of it is among them, rising."""
        touched = any(layer in self.layers for layer in layers)
        return sorted({*layers, *(self.layers if touched else ())})


def loop_of(config: Any, layers: int) -> Loop:
    """The loop of a model.

    Args:
        config: of its language model.
        layers: their number.
    """
    passes = int(getattr(config, "loop_num_passes", 1))
    start, stop = (
        int(getattr(config, f"loop_layer_index_{end}", layers)) for end in ("start", "end")
    )
    return Loop(start, stop, passes) if passes > 1 and start < stop else Loop(layers, layers, 1)


def message_of(model: Any, loop: Loop, layer: int) -> Message:
    """The function that makes the messages of a layer, [b, L, messages, H].

    It is given [b, L, blocks + 1, H], the blocks of the pass before and its last states. It has a
    copy of the weights that the model has now.
    """
    known = {id(model.config): model.config}
    module = copy.deepcopy(model.message_input, known)

    def message(previous: Tensor) -> Tensor:
        found: Tensor = module(previous[..., :-1, :], previous[..., -1, :], layer - loop.start)
        return found

    return message
