"""A layer's routed experts, all of them in the memory of a card.

Where they fit, a layer runs as the model runs it: forward once, backward once, batch by batch, and
no array of all tokens is needed. Elsewhere one expert is in memory at a time, on all its tokens
(walk.py, backward.py). The arithmetic is the same: outputs and gradients of experts are computed in
the dtype of the weights, and summed in float32 in the order of the experts' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor

from moepress.blocks.form import Form
from moepress.errors import MoepressError
from moepress.memory import free_memory
from moepress.original.batches import chunks
from moepress.original.card_readers import in_use
from moepress.original.experts import (
    ExpertWeights,
    Routed,
    RoutedExpert,
    expert_gradients,
)
from moepress.original.source import Source

SHARE = (
    0.4  # of a card's free memory, that the experts of a layer may take; the rest is for a batch
)

# The same, while the experts of another layer run.
SHARE_AHEAD = 0.2

# What stands in place of the experts module: (inputs [t, H], index [t, k], weights [t, k]) to
# outputs [t, H].
ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ResidentExperts:
    """The routed experts of a layer, in the order of their numbers."""

    layer: int
    module: Any  # the skeleton's experts module
    form: Form
    weights: Sequence[ExpertWeights | None]  # None: the expert is left out

    def routed(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Routed:
        """The choices of some tokens, on their device."""
        experts, neuron = self.form.split(index)
        return Routed(
            hidden.detach().to(self.dtype),
            experts,
            weight.detach().float(),
            scales_input=self.form.scales_input,
            neuron=neuron,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(one.down.dtype for one in self.weights if one is not None)

    def output(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum [t, H] of the experts' outputs, in the dtype of `hidden` [t, H].

        Args:
            index: [t, k] int64; from E on it means no expert.
            weight: [t, k] routing weights.
        """
        sums = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        routed = self.routed(hidden, index, weight)
        try:
            for expert, chunk in self._parts(routed):
                y = expert.output(chunk).float()
                sums.index_add_(0, expert.tokens[chunk], y * expert.gate[chunk, None])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the model's layer, which calls this, is not to blame
            raise MoepressError(f"The experts of layer {self.layer} cannot run: {error}") from error
        return sums.to(hidden.dtype)

    def gradients(
        self, hidden: Tensor, index: Tensor, weight: Tensor, at_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients [t, H] and [t, k] float32 at `hidden` and at `weight`.

        See the second step of backward.py.

        Args:
            at_output: [t, H] gradient at what `output` returns.
        """
        routed = self.routed(hidden, index, weight)
        at_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        at_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for expert, chunk in self._parts(routed):
            token, place = expert.tokens[chunk], expert.places[chunk]
            found, along = expert_gradients(expert, chunk, at_output[token].float())
            at_hidden.index_add_(0, token, found.float())
            at_weight[token, place] = along
        return at_hidden, at_weight

    def differentiable(self, norms: list[Tensor]) -> ExpertsForward:
        """`output`, which autograd can differentiate.

        Args:
            norms: gets the squared norms [t] float32 of the gradient at each output.
        """

        def forward(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            given = hidden, weight, index, self, norms
            y: Tensor = _Differentiable.apply(*given)  # type: ignore[no-untyped-call]
            return y

        return forward

    def _parts(self, routed: Routed) -> Iterator[tuple[RoutedExpert, slice]]:
        """Each expert, with each chunk of its tokens."""
        for number, weights in enumerate(self.weights):
            if weights is None:
                continue
            expert = RoutedExpert(self.layer, number, self.module, weights, routed)
            for chunk in chunks(expert.tokens):
                yield expert, chunk


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        index: Tensor,
        experts: ResidentExperts,
        norms: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, index)
        ctx.experts, ctx.norms = experts, norms
        return experts.output(hidden, index, weight)

    @staticmethod
    def backward(ctx: Any, at_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, index = ctx.saved_tensors
        ctx.norms.append(at_output.float().square().sum(1))
        at_hidden, at_weight = ctx.experts.gradients(hidden, index, weight, at_output)
        return at_hidden.to(hidden.dtype), at_weight.to(weight.dtype), None, None, None


def resident_experts(source: Source, layer: int, module: Any) -> ResidentExperts | None:
    """The experts of a layer, read to the card; None: they have no room there.

    Args:
        module: the skeleton's experts module.
    """
    if not have_room(source, layer):
        return None
    experts = source.experts[layer]
    read = source.experts_in_turn(layer, range(experts.experts))
    return ResidentExperts(layer, module, experts.form, list(read))


@dataclass(frozen=True)
class _Begun:
    """The experts of a layer, while they are read."""

    layer: int
    read: Future[list[ExpertWeights] | None]
    unwanted: Event


class ComingExperts:
    """Reads the experts of the layer that a walk comes to next, while a layer runs.

    At most one layer is on the card that way: a walk may skip the layer that was begun.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "moepress-next-experts")
        self._begun: _Begun | None = None

    def begin(self, source: Source, layer: int | None) -> None:
        """Begin to read a layer's experts to the card, if it has much room for them."""
        self._let_go()
        if layer is None or layer not in source.experts:
            return
        if have_room(source, layer, SHARE_AHEAD):
            unwanted = Event()
            self._begun = _Begun(layer, self._pool.submit(_read, source, layer, unwanted), unwanted)

    def take(self, source: Source, layer: int, module: Any) -> ResidentExperts | None:
        """What `resident_experts` returns, perhaps read already."""
        if self._begun is None or self._begun.layer != layer:
            self._let_go()
            return resident_experts(source, layer, module)
        begun, self._begun = self._begun, None
        read = begun.read.result()
        if read is None:  # what ran meanwhile took the room
            return resident_experts(source, layer, module)
        source.upcoming.experts(layer, ())  # begins with the files of the next layer
        weights = [in_use(one, source.device) for one in read]
        return ResidentExperts(layer, module, source.experts[layer].form, weights)

    def _let_go(self) -> None:
        """Free the memory of what was begun."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.unwanted.set()
            wait([begun.read])  # until then it takes room on the card


def _read(source: Source, layer: int, unwanted: Event) -> list[ExpertWeights] | None:
    """All experts of a layer, read to the card; None: they are unwanted, or the card was full."""
    found: list[ExpertWeights] = []
    try:
        for weights in source.experts_to_card(layer, range(source.experts[layer].experts)):
            if unwanted.is_set():
                return None
            found.append(weights)
    except torch.OutOfMemoryError:
        return None
    return found


def have_room(source: Source, layer: int, share: float = SHARE) -> bool:
    """Whether all experts of a layer have room in the memory of the card, if there is one.

    Args:
        share: of the free memory, that they may take.
    """
    on_card = source.device.type == "cuda"
    return on_card and experts_bytes(source, layer) <= share * free_memory(source.device)


def experts_bytes(source: Source, layer: int) -> int:
    """Bytes of the routed experts of a layer, in the dtype of the computation."""
    experts = source.experts[layer]
    weights = sum(rows * cols for rows, cols in (experts.gate_up_shape, experts.down_shape))
    return experts.experts * weights * source.compute_dtype.itemsize
