"""What reaches the routed experts of a layer, recorded while the layer runs batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.blocks.form import Form
from moepress.original.division import Division
from moepress.original.experts import Routed


class Record:
    """Inputs and choices of a layer's routed experts, batch by batch.

    Args:
        hidden: [T, H], is filled.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.done = 0  # the token that comes next
        self._index: list[Tensor] = []
        self._weight: list[Tensor] = []

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> None:
        self.hidden[self.done : self.done + len(x)] = x
        self.done += len(x)
        self._index.append(index)
        self._weight.append(weight)

    def routed(self, form: Form, division: Division) -> Routed:
        """What was recorded, with what other ranks have recorded."""
        division.spread(self.hidden)
        index, weight = (
            division.everywhere(torch.cat(own).to("cpu", dtype=dtype) if own else None)
            for own, dtype in ((self._index, None), (self._weight, torch.float32))
        )
        experts, neuron = form.split(index)
        return Routed(self.hidden, experts, weight, scales_input=form.scales_input, neuron=neuron)
