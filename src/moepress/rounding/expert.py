"""Round the two projections of a routed expert with Hessians of its own tokens.

Scoring rounds at every width, quantizing at the widths of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from moepress.kernels.memory import free_memory
from moepress.original.batches import chunks
from moepress.original.experts import ExpertWeights, RoutedExpert, expert_hidden
from moepress.original.source import Source
from moepress.rounding.hessian import Factor
from moepress.rounding.inputs import Inputs
from moepress.rounding.methods import Matrix, Unrounded, quantize_matrices
from moepress.rounding.options import Rounding
from moepress.rounding.tokens import hessian_tokens

# From the expert's inputs [T, H] to the inputs [T, K] of one of its matrices.
ToMatrixInputs = Callable[[Tensor], Tensor]


def round_experts(
    experts: Sequence[RoutedExpert], rounding: Rounding, widths: Sequence[Sequence[int]]
) -> list[tuple[Matrix, Matrix]]:
    """Round gate and up of each expert to its first width, then down to its second.

    Down is rounded on the inputs that the rounded gate and up give it. Each expert is rounded as if
    alone; several at a time take less time on a card (`experts_at_once`).
    """

    def rounded(targets: Iterable[tuple[Tensor, Factor | None]], which: int) -> list[Matrix]:
        matrices = [
            Unrounded(target, rounding.codec(of_expert[which], target.shape[1]), factor)
            for (target, factor), of_expert in zip(targets, widths, strict=True)
        ]
        return quantize_matrices(rounding.quantizer, matrices)

    gate_ups = rounded((_gate_up_target(expert, rounding) for expert in experts), 0)
    if not rounding.needs_hessian:
        downs = rounded(((expert.weights.down, None) for expert in experts), 1)
        return list(zip(gate_ups, downs, strict=True))
    weights = [expert.weights.down for expert in experts]
    inputs = [
        down_inputs(expert, gate_up.dequantize(expert.weights.gate_up.dtype), rounding)
        for expert, gate_up in zip(experts, gate_ups, strict=True)
    ]
    targets = [_target(*pair, rounding) for pair in zip(weights, inputs, strict=True)]
    downs = [
        one.rescaled(down, weight, factor)
        for one, down, weight, (_, factor) in zip(
            inputs, rounded(targets, 1), weights, targets, strict=True
        )
    ]
    return list(zip(gate_ups, downs, strict=True))


def experts_at_once(source: Source, layer: int, rounding: Rounding) -> int:
    """How many experts of a layer `round_experts` should get: on a card as many as have room."""
    if source.device.type != "cuda" or rounding.family != "trellis":
        return 1
    experts = source.experts[layer]
    gate_up, down = (rows * cols for rows, cols in (experts.gate_up_shape, experts.down_shape))
    hidden, inner = experts.gate_up_shape[1], experts.down_shape[1]
    size = source.compute_dtype.itemsize
    # Beside the weights, one expert takes four copies in float32 and one of bytes of a matrix, and
    # for its inputs a Hessian's factor, the feedback made of it, and a correction.
    first = 17 * gate_up + 12 * hidden * hidden
    second = (1 + size) * gate_up + 17 * down + 12 * inner * inner
    each = size * (gate_up + down) + max(first, second)
    passing = 8 * gate_up + 8 * inner * inner  # what is used for one matrix after the other
    fitting = max(1, int((free_memory(source.device) - passing) / (1.1 * each)))
    return -(-experts.experts // -(-experts.experts // fitting))  # groups of equal size


def round_gate_up(expert: RoutedExpert, rounding: Rounding, widths: Sequence[int]) -> list[Matrix]:
    """The fused gate and up projection [2I, H] at each width; one factorization serves all.

    If the expert comes with its inputs in the original model (`Routed.original`), the weights make
    up for a share of the difference between the expert's inputs now and these (correction.py).
    """
    return _round(*_gate_up_target(expert, rounding), rounding, widths)


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


def _gate_up_target(expert: RoutedExpert, rounding: Rounding) -> tuple[Tensor, Factor | None]:
    weight = expert.weights.gate_up
    if not rounding.needs_hessian:
        return weight, None
    return _target(weight, gate_up_inputs(expert, rounding), rounding)


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
    return quantize_matrices(
        rounding.quantizer, [Unrounded(weight, codec, factor) for codec in codecs]
    )


def _unchanged(x: Tensor) -> Tensor:
    return x
