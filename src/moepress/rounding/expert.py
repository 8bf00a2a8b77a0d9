"""Round the two projections of a routed expert with Hessians of its own tokens.

Scoring rounds at every width, quantizing at the widths of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from moepress.original.batches import chunks
from moepress.original.experts import ExpertWeights, RoutedExpert, expert_hidden
from moepress.rounding.hessian import Factor
from moepress.rounding.inputs import Inputs
from moepress.rounding.methods import Matrix, quantize_matrix
from moepress.rounding.options import Rounding
from moepress.rounding.tokens import hessian_tokens

# From the expert's inputs [T, H] to the inputs [T, K] of one of its matrices.
ToMatrixInputs = Callable[[Tensor], Tensor]


def round_expert(
    expert: RoutedExpert, rounding: Rounding, widths: Sequence[int]
) -> tuple[Matrix, Matrix]:
    """Round gate and up to the first width, then down to the second.

    Down is rounded on the inputs that the rounded gate and up give it.
    """
    (gate_up,) = round_gate_up(expert, rounding, widths[:1])
    rounded = gate_up.dequantize(expert.weights.gate_up.dtype)
    (down,) = round_down(expert, rounded, rounding, widths[1:])
    return gate_up, down


def round_gate_up(expert: RoutedExpert, rounding: Rounding, widths: Sequence[int]) -> list[Matrix]:
    """The fused gate and up projection [2I, H] at each width; one factorization serves all.

    If the expert comes with its inputs in the original model (`Routed.original`), the weights make
    up for a share of the difference between the expert's inputs now and these (correction.py).
    """
    weight = expert.weights.gate_up
    if not rounding.needs_hessian:
        return _round(weight, None, rounding, widths)
    target, factor = _target(weight, gate_up_inputs(expert, rounding), rounding)
    return _round(target, factor, rounding, widths)


def round_down(
    expert: RoutedExpert, gate_up: Tensor, rounding: Rounding, widths: Sequence[int]
) -> list[Matrix]:
    """The down projection [H, I] at each width.

    If the expert comes with its inputs in the original model (`Routed.original`), the weights are
    moved to make up for part of the difference to the original model's inputs; then the scales are
    multiplied by the one gain that brings the outputs nearest to the original ones (correction.py).

    Args:
        gate_up: [2I, H] weights that make the inputs of down: the original ones to score one
            projection alone, the rounded ones to apply a plan.
    """
    weight = expert.weights.down
    if not rounding.needs_hessian:
        return _round(weight, None, rounding, widths)
    inputs = down_inputs(expert, gate_up, rounding)
    target, factor = _target(weight, inputs, rounding)
    matrices = _round(target, factor, rounding, widths)
    return [inputs.rescaled(matrix, weight, factor) for matrix in matrices]


def gate_up_inputs(expert: RoutedExpert, rounding: Rounding) -> Inputs:
    """Statistics of the inputs of gate and up."""
    return _gathered(expert.weights.gate_up, expert, rounding, _unchanged, _unchanged)


def down_inputs(expert: RoutedExpert, gate_up: Tensor, rounding: Rounding) -> Inputs:
    """Statistics of the inputs of `down`, which weights `gate_up` [2I, H] make."""
    now = partial(expert_hidden, expert.module, gate_up)
    original = partial(expert_hidden, expert.module, expert.weights.gate_up)
    return _gathered(expert.weights.down, expert, rounding, now, original)


def dequantized(gate_up: Matrix, down: Matrix, like: ExpertWeights) -> ExpertWeights:
    """Two rounded projections as weights, in the dtype of `like`."""
    return ExpertWeights(gate_up.dequantize(like.gate_up.dtype), down.dequantize(like.down.dtype))


def _gathered(
    weight: Tensor,
    expert: RoutedExpert,
    rounding: Rounding,
    now: ToMatrixInputs,
    original: ToMatrixInputs,
) -> Inputs:
    """Statistics of a matrix's inputs on the tokens of the expert's Hessian.

    Args:
        now: gives the matrix's inputs from the expert's inputs once earlier layers are rounded.
        original: gives the matrix's inputs from the expert's inputs in the original model.
    """
    routed = expert.routed
    tokens, weights = hessian_tokens(routed, expert.layer, expert.number, rounding.tokens)
    device = weight.device
    inputs = Inputs(weight.shape[1], device, rounding.family, routed.original is not None)
    for chunk in chunks(tokens):
        some = tokens[chunk]
        x = now(routed.hidden[some].to(device))
        before = None if routed.original is None else original(routed.original[some].to(device))
        inputs.add(x, before, weights[chunk].to(device))
    return inputs


def _target(weight: Tensor, inputs: Inputs, rounding: Rounding) -> tuple[Tensor, Factor]:
    """(weights to round, factor of the Hessian).

    The weights are corrected if `inputs` also gathered the inputs in the original model.
    """
    target = inputs.corrected(weight, rounding.damping, rounding.correction)
    return target, inputs.factor(rounding.damping)


def _round(
    weight: Tensor, factor: Factor | None, rounding: Rounding, widths: Sequence[int]
) -> list[Matrix]:
    codecs = [rounding.codec(bits, weight.shape[1]) for bits in widths]
    return [quantize_matrix(rounding.quantizer, weight, codec, factor) for codec in codecs]


def _unchanged(x: Tensor) -> Tensor:
    return x
