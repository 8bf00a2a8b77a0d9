"""The routed experts of a layer during a walk: their weights, tokens, routing and outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.original.batches import chunks


class ExpertWeights(NamedTuple):
    """The weights of one expert, in the dtype of the computation."""

    gate_up: Tensor  # [2I, H], gate rows first
    down: Tensor  # [H, I]


@dataclass(frozen=True)
class Routed:
    """What reaches the routed experts of one layer. T tokens of all sequences, k chosen each."""

    hidden: Tensor  # [T, H] input of the experts, in the dtype of the computation
    index: Tensor  # [T, k] int64 chosen experts; an index of E or above means no expert
    weight: Tensor  # [T, k] float32 routing weights
    sensitivity: Tensor | None = None  # [T] float32, costs/sensitivity.py; None: all tokens alike
    original: Tensor | None = None  # [T, H] `hidden` in the original model; None: not needed

    def with_sensitivity(self, sensitivity: Tensor | None) -> Routed:
        return replace(self, sensitivity=sensitivity)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens of an expert [T_e] int64, rising, and its places [T_e] int64 in their choices."""
        token, place = (self.index == expert).nonzero(as_tuple=True)
        return token, place

    def statistics(self, experts: int) -> tuple[Tensor, Tensor]:
        """Number of tokens [E] int64 and sum of routing weights [E] float64 of each expert.

        Args:
            experts: E.
        """
        chosen = self.index.flatten()
        real = chosen < experts
        weight = self.weight.flatten().double()[real]
        tokens = torch.bincount(chosen[real], minlength=experts)
        sums = torch.zeros(experts, dtype=torch.float64)
        return tokens, sums.index_add_(0, chosen[real], weight)


@dataclass(frozen=True)
class RoutedExpert:
    """One routed expert: its weights, and the tokens of its layer that chose it."""

    layer: int  # index of the decoder layer
    number: int  # of the expert in its layer
    module: Any  # the skeleton's experts module, for its gate function
    weights: ExpertWeights  # original or rounded
    routed: Routed

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
        """[T_e] float32 routing weights of `tokens`."""
        return self.routed.weight[self.tokens, self.places]

    def with_weights(self, weights: ExpertWeights) -> RoutedExpert:
        """The same expert with other weights, on the same tokens."""
        return replace(self, weights=weights)

    def add_output(self, output: Tensor) -> None:
        """Add the weighted output of this expert on its tokens to `output` [T, H] float32."""
        for chunk in chunks(self.tokens):
            tokens = self.tokens[chunk]
            x = self.routed.hidden[tokens].to(self.weights.down.device)
            y = expert_forward(self.module, self.weights, x).float().to(output.device)
            gate = self.gate[chunk, None].to(output.device)
            output.index_add_(0, tokens.to(output.device), y * gate)


def expert_hidden(module: Any, gate_up: Tensor, x: Tensor) -> Tensor:
    """Inner activations [T, I] of an expert, the input of down: act(gate x) * up x."""
    inner: Tensor = module._apply_gate(F.linear(x, gate_up))
    return inner


def expert_forward(module: Any, weights: ExpertWeights, x: Tensor) -> Tensor:
    """Output [T, H] of one expert for inputs [T, H], not yet times the routing weight."""
    return F.linear(expert_hidden(module, weights.gate_up, x), weights.down)
