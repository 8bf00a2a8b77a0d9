"""Scales of the channels that the experts of a layer read, where these are scaled unevenly.

(W / s)(s x) = W x: inputs of gate and up can be scaled, and the columns of the weights scaled back.
Rounding leaves about the same error in all columns, so the loss grows by

    mean over columns of e / s^2   times   mean over columns of D s^2,

with e the mean square of a column's weights and D the variance of its inputs that the other inputs
do not tell. It is least at s = (e / D)^(1/4). Where the norm in front of the block scales channels
unevenly, that is much less than without s. The scales are one vector for all experts of a layer;
it is stored, and the packed experts multiply their inputs by it. Most layers need none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.format.codec import pre_quant_scale_of
from moepress.original.batches import BATCH_TOKENS
from moepress.original.experts import Routed, RoutedExpert
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.sending import sent

LEAST_GAIN = 0.02  # of the loss. Less is not worth a multiplication while the model runs
CHANCE = 4  # over the number of tokens: what is gained on these by chance, and more
RIDGE = 0.1  # added to the correlations of the inputs; D of few tokens is less exact, not smaller
TOKENS = 8192  # that are enough for the correlations
ROWS = 16384  # of weights that are enough for the sizes of columns
OCTAVES = 12  # at most so many, up or down: the scales stay numbers of float16


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
    found = torch.ones(routed.hidden.shape[1] + 1)
    found[-1] = 0
    if walk.ranks.first and (numbers := _most_chosen(walk, layer, routed)):
        weights = (expert.weights.gate_up for expert in walk.experts(layer, numbers, routed))
        energy = _mean_squares(weights)[: len(found) - 1]
        sample = sent(_sample(routed), walk.source.device)
        found[:-1], gain = channel_scale(energy.cpu(), own_variance(sample).cpu())
        found[-1] = gain - CHANCE / len(sample)
    walk.ranks.give(found, 0)
    return found[:-1].to(routed.hidden), float(found[-1])


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


def channel_scale(energy: Tensor, variance: Tensor) -> tuple[Tensor, float]:
    """s [H] float32 of bfloat16 numbers, and the share of the loss that it gains.

    The mean square of the inputs stays about as it is.

    Args:
        energy: [H] e, mean squares of the columns of the weights.
        variance: [H] D, `own_variance` of the inputs.
    """
    found = torch.ones(len(energy), dtype=torch.float64)
    used = (energy > 0) & (variance > 0)
    if not used.any():
        return found.float(), 0.0
    e, d = energy[used].double(), variance[used].double()
    scale = (e / d) ** 0.25
    scale *= (d.mean() / (d * scale**2).mean()).sqrt()
    gain = 1 - (e / scale**2).mean() * (d * scale**2).mean() / (e.mean() * d.mean())
    found[used] = scale.clamp(2.0**-OCTAVES, 2.0**OCTAVES)
    return found.bfloat16().float(), float(gain)


def own_variance(x: Tensor) -> Tensor:
    """D [H] float32: what the other channels do not tell of the mean square of each.

    1 / diag of the inverse of the correlations, times the mean squares; so D of channels that are
    scaled is scaled by the square.

    Args:
        x: [t, H] inputs.
    """
    width = x.shape[1]
    products = torch.zeros(width, width, device=x.device)
    parts = torch.split(x, BATCH_TOKENS)
    size = _mean_squares(parts).float().clamp(min=torch.finfo(torch.float32).tiny)
    for some in parts:
        part = some.float() / size.sqrt()
        products.addmm_(part.T, part)
    products /= len(x)
    products.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(products).L)
    return size / inverse.diagonal()


def _mean_squares(parts: Iterable[Tensor]) -> Tensor:
    """Mean squares [H], in float64, of the columns of matrices [n, H]."""
    sums, rows = torch.zeros(()), 0
    for part in parts:
        sums = sums.to(part.device) + part.float().square().sum(0, dtype=torch.float64)
        rows += len(part)
    return sums / rows


def _most_chosen(walk: Walk, layer: int, routed: Routed) -> list[int]:
    """Numbers of the experts that have most tokens: two or more, of ROWS rows together."""
    experts = walk.source.experts[layer]
    tokens, _ = routed.statistics(experts.experts)
    count = max(2, -(-ROWS // experts.gate_up_shape[0]))
    most = tokens.argsort(descending=True, stable=True)[:count]
    return sorted(int(number) for number in most if tokens[number])


def _sample(routed: Routed) -> Tensor:
    """Inputs [t, H] of tokens at equal distances, at most TOKENS."""
    return routed.hidden[:: -(-len(routed.hidden) // TOKENS)]


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
