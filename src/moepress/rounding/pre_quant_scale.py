"""Scales of the inputs of a layer's experts (channel_scale.py), stored beside them.

One vector for all experts of a layer, which the packed experts multiply their inputs by. Most
layers need none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.format.codec import pre_quant_scale_of
from moepress.original.experts import Routed, RoutedExpert
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.rounding.channel_scale import LEAST_GAIN, TOKENS, best_scale
from moepress.sending import sent

ROWS = 16384  # of weights that are enough for the sizes of columns


def scale_if_worth(walk: Walk, layer: int, routed: Routed) -> Routed:
    """The same tokens with scales of their inputs, if these promise to gain enough.

    Neurons that tokens choose one by one have none: their table is a packed embedding.
    """
    if walk.source.experts[layer].form.by_neuron:
        return routed
    scale, gain = find_scale(walk, layer, routed)
    return routed.with_pre_quant_scale(scale) if gain > LEAST_GAIN else routed


def find_scale(walk: Walk, layer: int, routed: Routed) -> tuple[Tensor, float]:
    """Scales [H] of the inputs of a layer's experts, and the share of the loss that they gain.

    They are the same on all ranks, and bfloat16 numbers in the dtype of the inputs. What may be
    gained by chance is not counted.
    """

    def find() -> tuple[Tensor, float]:
        if not (numbers := _most_chosen(walk, layer, routed)):
            return torch.ones(routed.hidden.shape[1]), 0.0
        weights = (expert.weights.gate_up for expert in walk.experts(layer, numbers, routed))
        return best_scale(weights, [sent(_sample(routed), walk.source.device)])

    scale, gain = walk.ranks.agreed(find)
    return scale.to(routed.hidden), gain


def with_scaled_columns(expert: RoutedExpert) -> RoutedExpert:
    """The expert with weights for inputs that `Routed.pre_quant_scale` scales, if it does."""
    return _with_columns_times(expert, -1)


def with_plain_columns(expert: RoutedExpert) -> RoutedExpert:
    """The same expert for inputs that are not scaled."""
    plain = _with_columns_times(expert, 1)
    return plain.with_routed(plain.routed.with_pre_quant_scale(None))


def stored_scale(source: Source, layer: int, scale: Tensor) -> dict[str, Tensor]:
    """The tensor beside a layer's packed experts, padded as their columns are, by its name.

    Args:
        scale: [H], of `Routed`.
    """
    experts = source.experts[layer]
    padded = F.pad(scale, (0, experts.gate_up_shape[1] - len(scale)), value=1.0)
    return {pre_quant_scale_of(experts.parameters[0]): padded.to("cpu", torch.bfloat16)}


def scale_bytes(source: Source) -> int:
    """Bytes of `stored_scale`."""
    return source.one_layer_of_experts.gate_up_shape[1] * torch.bfloat16.itemsize


def _most_chosen(walk: Walk, layer: int, routed: Routed) -> list[int]:
    """Numbers of the experts that have most tokens: two or more, of ROWS rows together."""
    experts = walk.source.experts[layer]
    tokens, _ = routed.statistics(experts.experts)
    count = enough_experts(experts.gate_up_shape[0])
    most = tokens.argsort(descending=True, stable=True)[:count]
    return sorted(int(number) for number in most if tokens[number])


def _sample(routed: Routed) -> Tensor:
    """Inputs [t, H] of tokens at equal distances, at most TOKENS."""
    return routed.hidden[:: step_of_sample(len(routed.hidden))]


def enough_experts(rows: int) -> int:
    """Number of experts whose gate and up have ROWS rows together: two or more."""
    return max(2, -(-ROWS // rows))


def step_of_sample(tokens: int) -> int:
    """n: every n-th of some tokens makes TOKENS of them at most."""
    return -(-tokens // TOKENS)


def _with_columns_times(expert: RoutedExpert, power: int) -> RoutedExpert:
    scale, weights = expert.routed.pre_quant_scale, expert.weights
    if scale is None:
        return expert
    gate_up = weights.gate_up
    factor = sent(scale, gate_up.device).float() ** power
    factor = F.pad(factor, (0, gate_up.shape[1] - len(factor)), value=1.0)
    return expert.with_weights(
        weights._replace(gate_up=(gate_up.float() * factor).to(gate_up)), expert.hidden
    )
