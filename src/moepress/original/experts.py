"""The routed experts of a layer during a walk: their weights, tokens, routing and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.blocks.form import apply_gate, finish
from moepress.blocks.layout import widened
from moepress.original.batches import chunks, empty
from moepress.sending import rows_sent, sent


class ExpertWeights(NamedTuple):
    """The weights of one expert, in the dtype of the computation.

    R = 2I, gate rows first; R = I without a gate. H and I are padded to multiples of 32. Tables of
    neurons (`Form.by_neuron`) are [I, H], down too.
    """

    gate_up: Tensor  # [R, H]
    down: Tensor  # [H, I]
    gate_up_bias: Tensor | None = None  # [R]
    down_bias: Tensor | None = None  # [H]

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """The weights with a function applied to each tensor."""
        biases = (b if b is None else function(b) for b in (self.gate_up_bias, self.down_bias))
        return ExpertWeights(function(self.gate_up), function(self.down), *biases)


@dataclass(frozen=True)
class Routed:
    """What reaches the routed experts of one layer. T tokens of all sequences, k chosen each."""

    hidden: Tensor  # [T, H] input of the experts, in the dtype of the computation
    index: Tensor  # [T, k] int64 chosen experts; an index of E or above means no expert
    weight: Tensor  # [T, k] float32 routing weights
    # The routing weight scales an expert's input, and not its output: f(w x) in place of w f(x).
    scales_input: bool = field(default=False, kw_only=True)
    sensitivity: Tensor | None = None  # [T] float32, costs/sensitivity.py; None: all tokens alike
    original: Tensor | None = None  # [T, H] `hidden` in the original model; None: not needed
    neuron: Tensor | None = None  # [T, k] int64 of the expert, which uses it alone; None: all
    # [H] what the channels of all inputs are multiplied by in front of an expert, in the dtype of
    # `hidden`: rounding/pre_quant_scale.py; None: they are not scaled.
    pre_quant_scale: Tensor | None = None

    def with_sensitivity(self, sensitivity: Tensor | None) -> Routed:
        return replace(self, sensitivity=sensitivity)

    def with_pre_quant_scale(self, scale: Tensor | None) -> Routed:
        return replace(self, pre_quant_scale=scale)

    def of_tokens(self, some: Tensor) -> Routed:
        """The same of some tokens [t], without what is only needed to score and to correct."""
        return Routed(
            self.hidden[some],
            self.index[some],
            self.weight[some],
            scales_input=self.scales_input,
            neuron=None if self.neuron is None else self.neuron[some],
            pre_quant_scale=self.pre_quant_scale,
        )

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens of an expert [T_e] int64, rising, and its places [T_e] int64 in their choices.

        A token that chose several of its neurons is there once for each.
        """
        order, chosen = self._by_expert
        start = int(torch.searchsorted(chosen, expert))
        own = order[start : int(torch.searchsorted(chosen, expert, right=True))]
        return own // self.index.shape[1], own % self.index.shape[1]

    @cached_property
    def _by_expert(self) -> tuple[Tensor, Tensor]:
        """The choices [T k] int64, numbered, by rising expert; and these experts, on the CPU."""
        flat = self.index.flatten()
        if flat.is_cuda:
            order = flat.argsort(stable=True)
            return order, flat[order].cpu()
        # NumPy sorts numbers of 16 bits in linear time.
        small = flat.numpy().astype(np.int16 if (flat.abs() < 1 << 15).all() else np.int64)
        order = torch.from_numpy(np.argsort(small, kind="stable"))
        return order, flat[order]

    def inputs(self, states: Tensor, expert: int, tokens: Tensor, device: torch.device) -> Tensor:
        """[t, H] what an expert gets of the states of `tokens` [t].

        Args:
            states: [T, H], `hidden` or `original`.
            device: where it is needed.
        """
        x = rows_sent(states, tokens, device)
        scale = self.input_scale(expert, tokens)
        x = x if scale is None else x * scale.to(x)
        return x if self.pre_quant_scale is None else x * self.pre_quant_scale.to(x)

    def input_scale(self, expert: int, tokens: Tensor) -> Tensor | None:
        """[t, 1] float32, the routing weights that scale the inputs of `tokens` [t] of an expert.

        None: they are not scaled. A token that did not choose the expert has the mean of those that
        did.
        """
        if not self.scales_input:
            return None
        own, places = self.of(expert)
        weight = self.weight[own, places]
        usual = float(weight.mean()) if len(own) else 1.0
        scale = torch.full((len(self.hidden),), usual, device=weight.device)
        scale[own] = weight
        return scale[tokens, None]

    def statistics(self, experts: int) -> tuple[Tensor, Tensor]:
        """Number of tokens [E] int64 and sum of routing weights [E] float64 of each expert.

        Args:
            experts: E.
        """
        chosen = self.index.flatten()
        real = chosen < experts
        weight = self.weight.flatten().double()[real]
        sums = torch.zeros(experts, dtype=torch.float64)
        sums.index_add_(0, chosen[real], weight)
        if self.neuron is not None:  # a token counts once, however many neurons it chose
            rising = self.index.sort(dim=1).values
            chosen = rising[rising.diff(dim=1, prepend=rising[:, :1] - 1) > 0]
        return torch.bincount(chosen[chosen < experts], minlength=experts), sums


@dataclass(frozen=True)
class RoutedExpert:
    """One routed expert: its weights, and the tokens of its layer that chose it.

    T_e counts choices: a token that chose several of its neurons is there once for each.
    """

    layer: int  # index of the decoder layer
    number: int  # of the expert in its layer
    module: Any  # the skeleton's experts module, for its gate function and its norm
    weights: ExpertWeights  # original or rounded
    routed: Routed
    hidden: Tensor | None = None  # [T_e, I] inputs of down that `weights` make; None: not kept

    @cached_property
    def _choices(self) -> tuple[Tensor, Tensor]:
        return self.routed.of(self.number)

    @property
    def tokens(self) -> Tensor:
        """[T_e] int64 tokens that chose this expert, rising."""
        return self._choices[0]

    @property
    def places(self) -> Tensor:
        """[T_e] int64 place of this expert among the k choices of each of `tokens`."""
        return self._choices[1]

    @cached_property
    def gate(self) -> Tensor:
        """[T_e] float32, what the outputs for `tokens` are scaled by: the routing weights."""
        weight = self.routed.weight[self.tokens, self.places]
        return torch.ones_like(weight) if self.routed.scales_input else weight

    def inputs(self, chunk: slice) -> Tensor:
        """[t, H] inputs of the expert for a chunk of `tokens`, on the device of the weights."""
        routed, device = self.routed, self.weights.down.device
        return routed.inputs(routed.hidden, self.number, self.tokens[chunk], device)

    def neurons(self, chunk: slice) -> Tensor | None:
        """[t] int64 neuron that each of a chunk of `tokens` uses, beside the weights; None: all."""
        if self.routed.neuron is None:
            return None
        chosen = self.routed.neuron[self.tokens[chunk], self.places[chunk]]
        return sent(chosen, self.weights.down.device)

    @property
    def inner(self) -> int:
        """Inner activations of a token: I, or 1 of a single neuron."""
        return self.weights.down.shape[1] if self.routed.neuron is None else 1

    def output(self, chunk: slice) -> Tensor:
        """[t, H] output for a chunk of `tokens`, not yet times the routing weights."""
        weights, neurons = self.weights, self.neurons(chunk)
        if self.hidden is None:
            return expert_forward(self.module, weights, self.inputs(chunk), neurons)
        size, inner = self.routed.hidden.shape[1], sent(self.hidden[chunk], weights.down.device)
        return expert_output(self.module, weights.down, inner, size, weights.down_bias, neurons)

    def with_weights(self, weights: ExpertWeights, hidden: Tensor | None = None) -> RoutedExpert:
        """The same expert with other weights, on the same tokens.

        Args:
            hidden: inputs of down that they make, if they are kept.
        """
        return replace(self, weights=weights, hidden=hidden)

    def with_routed(self, routed: Routed) -> RoutedExpert:
        """The same expert with the same choices of the same tokens, whose inputs are given anew."""
        return replace(self, routed=routed)


def expert_hidden(
    module: Any,
    gate_up: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    neurons: Tensor | None = None,
) -> Tensor:
    """Inner activations [T, I] of an expert, the input of down: act(gate x) * up x, for instance.

    Args:
        gate_up: [R, H].
        x: [T, H]; H may lack the padding of the weights.
        bias: [R].
        neurons: [T], of which each token has one. Then the result is [T, 1].
    """
    if neurons is not None:
        return apply_gate(module, (x.unsqueeze(1) @ gate_up[neurons].unsqueeze(2)).squeeze(2))
    return apply_gate(module, F.linear(widened(x, gate_up.shape[1]), gate_up, bias))


def hidden_states(expert: RoutedExpert, gate_up: Tensor) -> Tensor:
    """Inputs [T_e, I] of down that weights [R, H] make from the inputs of an expert's tokens."""
    own, device = len(expert.tokens), gate_up.device
    hidden = empty((own, expert.inner), expert.weights.down.dtype, device)
    bias = expert.weights.gate_up_bias
    for chunk in chunks(expert.tokens):
        x, neurons = expert.inputs(chunk), expert.neurons(chunk)
        hidden[chunk] = expert_hidden(expert.module, gate_up, x, bias, neurons)
    return hidden


def expert_output(
    module: Any,
    down: Tensor,
    inner: Tensor,
    size: int,
    bias: Tensor | None = None,
    neurons: Tensor | None = None,
) -> Tensor:
    """Output [T, size] of an expert for inner activations [T, I].

    Args:
        down: [H, I].
        size: of the experts' outputs, without padding.
        bias: [H].
        neurons: [T], of which each token has one. Then `inner` is [T, 1] and `down` a table [I, H].
    """
    if neurons is not None:
        return finish(module, inner * down[neurons])
    return finish(module, F.linear(inner, down, bias)[..., :size])


def expert_forward(
    module: Any, weights: ExpertWeights, x: Tensor, neurons: Tensor | None = None
) -> Tensor:
    """Output [T, H] of one expert for inputs [T, H], not yet times the routing weight.

    Args:
        neurons: [T], the only one that each token uses; None: all.
    """
    inner = expert_hidden(module, weights.gate_up, x, weights.gate_up_bias, neurons)
    return expert_output(module, weights.down, inner, x.shape[-1], weights.down_bias, neurons)


def expert_gradients(
    expert: RoutedExpert, chunk: slice, at_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients [t, H] at the inputs of an expert, and [t] at its routing weights.

    See the second step of backward.py.

    Args:
        chunk: of the expert's tokens.
        at_output: [t, H] float32 gradient at the sum of the experts' weighted outputs, on the
            device of the weights.
    """
    token = expert.tokens[chunk]
    with torch.enable_grad():
        x = expert.inputs(chunk).requires_grad_()
        y = expert_forward(expert.module, expert.weights, x, expert.neurons(chunk))
    gate = sent(expert.gate[chunk, None], at_output.device)
    (found,) = torch.autograd.grad(y, x, (at_output * gate).to(y))
    scale = expert.routed.input_scale(expert.number, token)
    if scale is None:
        return found, (at_output * y.detach().float()).sum(1)
    found = found.float()  # x = w h, and the output is not scaled
    along = found * expert.routed.hidden[token].to(found)
    return found * scale.to(found), along.sum(1)
