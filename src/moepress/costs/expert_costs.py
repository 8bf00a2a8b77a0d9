"""The cost of a routed expert at each width: errors of its output, measured on its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepress.costs.scores import ROUNDED
from moepress.costs.texts import Texts
from moepress.format.codec import LEFT_OUT
from moepress.original.architectures import Experts
from moepress.original.batches import chunks
from moepress.original.experts import ExpertWeights, RoutedExpert, expert_hidden, expert_output
from moepress.rounding.expert import (
    dequantized,
    down_inputs,
    gate_up_inputs,
    round_downs,
    round_gate_ups,
)
from moepress.rounding.inputs import Inputs
from moepress.rounding.noise import draw, draw_ahead, noisy_weights
from moepress.rounding.options import Rounding


def rounded_weights(
    experts: Sequence[RoutedExpert], rounding: Rounding, expert_bits: Sequence[float]
) -> Iterator[list[ExpertWeights | None]]:
    """Each expert at every offered width, dequantized; None for width 0, which leaves it out.

    Each projection is rounded, or gets the error that rounding would leave, on the inputs that it
    has while the other one is original.
    """
    widths = [bits for bits in expert_bits if bits != LEFT_OUT]
    left_out = [None] * (LEFT_OUT in expert_bits)
    if rounding.draws:
        yield from ([*left_out, *_noisy(expert, rounding, widths)] for expert in experts)
        return
    same = [widths] * len(experts)
    gate_ups = round_gate_ups(experts, rounding, same)
    originals = [expert.weights.gate_up for expert in experts]
    downs = round_downs(experts, originals, rounding, same)
    for expert, *matrices in zip(experts, gate_ups, downs, strict=True):
        pairs = zip(*matrices, strict=True)
        yield [*left_out, *(dequantized(g, d, expert.weights) for g, d in pairs)]


def _noisy(
    expert: RoutedExpert, rounding: Rounding, widths: Sequence[float]
) -> Iterator[ExpertWeights]:
    """The expert with drawn errors at every width, in the dtype of its weights."""
    weights, seed = expert.weights, rounding.tokens.seed

    def noisy(weight: Tensor, projection: str, inputs: Inputs) -> Iterator[Tensor]:
        noise = draw(weight.shape, seed, _name(expert.layer, expert.number, projection))
        factor = inputs.factor(rounding.damping)
        return (w.to(weight.dtype) for w in noisy_weights(weight, widths, factor, noise))

    gate_ups = noisy(weights.gate_up, ROUNDED[0], gate_up_inputs(expert, rounding))
    downs = noisy(weights.down, ROUNDED[1], down_inputs(expert, weights.gate_up, rounding))
    pairs = zip(gate_ups, downs, strict=True)
    return (weights._replace(gate_up=gate_up, down=down) for gate_up, down in pairs)


def draw_experts_ahead(
    layer: int, numbers: Sequence[int], experts: Experts, rounding: Rounding
) -> None:
    """Begin to draw the errors of experts that will be scored soon."""
    shapes = experts.gate_up_shape, experts.down_shape
    for number in numbers:
        for shape, projection in zip(shapes, ROUNDED[:2], strict=True):
            draw_ahead(shape, rounding.tokens.seed, _name(layer, number, projection))


def _name(layer: int, number: int, projection: str) -> str:
    return f"layer {layer}, expert {number}, {projection}"


def measure(
    expert: RoutedExpert, offered: Sequence[ExpertWeights | None], texts: Texts, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error of an expert's output, and its cost, at every offered width.

    Args:
        expert: with its original weights.
        offered: the expert at each width; None: left out.
        output: [T, H] float32; the expert's exact weighted output is added to it.

    Returns:
        Squared errors [3, B] float64 by ROUNDED: gate_up alone, down alone, both rounded. And costs
        [D, 3, B] float64: the same errors for each text, weighted by the tokens' sensitivities.
    """
    errors = torch.zeros(len(ROUNDED), len(offered), dtype=torch.float64)
    costs = torch.zeros(texts.count, len(ROUNDED), len(offered), dtype=torch.float64)
    routed, weights = expert.routed, expert.weights
    for chunk in chunks(expert.tokens):
        token = expert.tokens[chunk]
        x = expert.inputs(chunk)
        g = expert.gate[chunk, None].to(x.device)
        hidden = expert_hidden(expert.module, weights.gate_up, x, weights.gate_up_bias)
        size, bias = x.shape[1], weights.down_bias
        exact = expert_output(expert.module, weights.down, hidden, size, bias).float() * g
        output.index_add_(0, token.to(output.device), exact.to(output.device))
        for option, candidate in enumerate(offered):
            for row, y in enumerate(_outputs(expert, candidate, hidden, x)):
                error = exact if y is None else y.float() * g - exact
                squared = error.square().sum(1).double().cpu()
                errors[row, option] += squared.sum()
                if routed.sensitivity is not None:
                    squared *= routed.sensitivity[token]
                costs[:, row, option] += texts.sums(squared, token)
    return errors, costs


def _outputs(
    expert: RoutedExpert, candidate: ExpertWeights | None, hidden: Tensor, x: Tensor
) -> Iterator[Tensor | None]:
    """The expert's outputs with each of ROUNDED; None if the expert is left out.

    Args:
        candidate: the rounded weights; None: left out.
        hidden: [t, I] inputs of down that the original gate and up give for the inputs x [t, H].
    """
    if candidate is None:
        yield from (None,) * len(ROUNDED)
        return
    module, original = expert.module, expert.weights
    changed = expert_hidden(module, candidate.gate_up, x, original.gate_up_bias)
    for inner, down in (
        (changed, original.down),
        (hidden, candidate.down),
        (changed, candidate.down),
    ):
        yield expert_output(module, down, inner, x.shape[1], original.down_bias)
