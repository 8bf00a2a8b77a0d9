"""Round the two projections of a routed expert with Hessians of its own tokens.

Scoring rounds at every width, quantizing at the widths of the plan. Shapes are those of packed
weights: R = 2I, or I without a gate; H and I padded to multiples of 32. Biases are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moepress.blocks.layout import widened
from moepress.memory import free_memory
from moepress.original.batches import chunks
from moepress.original.card_readers import READERS
from moepress.original.experts import RoutedExpert, expert_hidden, hidden_states
from moepress.original.source import Source
from moepress.rounding.factor import Factor
from moepress.rounding.inputs import Inputs
from moepress.rounding.methods import Matrix, Unrounded, quantize_matrices
from moepress.rounding.options import Rounding
from moepress.rounding.sweep import products_dtype, slices
from moepress.rounding.tokens import hessian_tokens
from moepress.sending import sent

# From the expert's inputs [T, H] to the inputs [T, K] of one of its matrices.
ToMatrixInputs = Callable[[Tensor], Tensor]


class AtOnce(NamedTuple):
    """How many experts of a layer are rounded in one call."""

    experts: int  # gate and up of so many
    downs: int  # down of so many of these


class GateUp(NamedTuple):
    """Weights of gate and up, and what they make."""

    weight: Tensor  # [R, H]
    hidden: Tensor | None = None  # [T_e, I] inputs of down for the expert's own tokens, if kept


class Rounded(NamedTuple):
    """The rounded projections of an expert."""

    gate_up: Matrix
    down: Matrix
    made: GateUp | None = None  # of the rounded gate and up, if kept


def round_experts(
    experts: Sequence[RoutedExpert],
    rounding: Rounding,
    widths: Sequence[Sequence[float]],
    downs: int | None = None,
) -> list[Rounded]:
    """Round gate and up of each expert to its first width, then down to its second.

    Down is rounded on the inputs that the rounded gate and up give it. Each expert is rounded as if
    alone; several at a time take less time on a card (`experts_at_once`).

    Args:
        downs: how many down projections are rounded in one call; None: all.
    """
    gate_ups = round_gate_ups(experts, rounding, [of_one[:1] for of_one in widths])
    results: list[Rounded] = []
    for some in slices(len(experts), downs or len(experts)):
        kept: list[GateUp] = []
        of_down = [of_one[1:] for of_one in widths[some]]
        made = _made(experts[some], gate_ups[some], kept)
        found = round_downs(experts[some], made, rounding, of_down)
        results += [
            Rounded(gate_up, down, kept[i] if kept else None)
            for i, ((gate_up,), (down,)) in enumerate(zip(gate_ups[some], found, strict=True))
        ]
    return results


def _made(
    experts: Sequence[RoutedExpert], gate_ups: Sequence[Sequence[Matrix]], kept: list[GateUp]
) -> Iterator[GateUp]:
    """What the rounded gate and up make, for each expert.

    A CPU takes longer to make it again, when the rounded expert runs, than to keep it in `kept`.
    """
    for expert, (gate_up,) in zip(experts, gate_ups, strict=True):
        weight = gate_up.dequantize(expert.weights.gate_up.dtype)
        if weight.device.type != "cpu":
            yield GateUp(weight)
            continue
        kept.append(GateUp(weight, hidden_states(expert, weight)))
        yield kept[-1]


def rounded_expert(expert: RoutedExpert, rounded: Rounded) -> RoutedExpert:
    """An expert with its rounded projections as weights, in the dtype of the original ones."""
    dtype, made = expert.weights.gate_up.dtype, rounded.made
    gate_up = rounded.gate_up.dequantize(dtype) if made is None else made.weight
    weights = expert.weights._replace(gate_up=gate_up, down=rounded.down.dequantize(dtype))
    return expert.with_weights(weights, None if made is None else made.hidden)


def experts_at_once(
    source: Source, layer: int, rounding: Rounding, widths: int = 1, kept: bool = False
) -> AtOnce:
    """How many experts of a layer to round in one call: on a card as many as have room.

    Args:
        widths: how many each projection is rounded to.
        kept: whether the rounded experts of the whole layer stay on the card.
    """
    if source.device.type != "cuda" or rounding.family != "trellis":
        return AtOnce(1, 1)
    experts = source.experts[layer]
    gate_up, down = (rows * cols for rows, cols in (experts.gate_up_shape, experts.down_shape))
    hidden, inner = experts.gate_up_shape[1], experts.down_shape[1]
    size = source.compute_dtype.itemsize * (gate_up + down)
    # Original weights, the branches of gate and up, and the rounded weights.
    of_each = size + widths * gate_up + (0 if kept else widths * size)
    # Beside these, of a matrix at work its corrected weights, and at each width two copies in
    # float32 and one of bytes; of its inputs a Hessian's factor, the feedback made of it, and a
    # correction, [K, K] or [N, K].
    of_gate_up = (4 + 8 * widths) * gate_up + 12 * hidden * hidden
    of_down = (8 + 9 * widths) * down + 8 * inner * inner
    gathered = 8 * down + 4 * inner * inner  # of a matrix whose search has not begun
    # What is used for one matrix after the other: while inputs are gathered, a Hessian, a copy and
    # chunks of inputs; later, weights or a factor before they have their final place.
    gathering = 12 * gate_up + 8 * inner * inner
    searching = 12 * gate_up
    searching_down = max(8 * inner * inner, 12 * down)
    # Experts that are read meanwhile, and rounded ones that stay.
    others = (min(READERS, experts.experts) + (experts.experts if kept else 0)) * size
    free = free_memory(source.device) / 1.1 - others

    def downs(together: int) -> int:
        rest = free - together * of_each
        return int(min((rest - searching_down) / of_down, (rest - gathering) / gathered))

    most = min(free - gathering, free - searching) / (of_each + of_gate_up)
    together = max(1, int(most))
    while together > 1 and downs(together) < 1:
        together -= 1
    together = _equal(experts.experts, together)
    return AtOnce(together, _equal(together, max(1, downs(together))))


def _equal(count: int, most: int) -> int:
    """The size of groups of about equal size of at most `most`, for `count` in all."""
    most = min(most, count)
    return -(-count // -(-count // most))


def round_gate_ups(
    experts: Sequence[RoutedExpert], rounding: Rounding, widths: Sequence[Sequence[float]]
) -> list[list[Matrix]]:
    """The fused gate and up projection [R, H] of each expert, at each of its widths.

    One factorization serves all widths of a matrix. If experts come with their inputs in the
    original model (`Routed.original`), the weights make up for a share of the difference between
    the expert's inputs now and these (correction.py).
    """
    targets = [_gate_up_target(expert, rounding) for expert in experts]
    return _round(targets, rounding, widths, products_dtype(experts[0].weights.gate_up))


def round_downs(
    experts: Sequence[RoutedExpert],
    gate_ups: Iterable[GateUp],
    rounding: Rounding,
    widths: Sequence[Sequence[float]],
) -> list[list[Matrix]]:
    """The down projection [H, I] of each expert, at each of its widths; [I, H] of neurons.

    If experts come with their inputs in the original model (`Routed.original`), the weights are
    moved to make up for part of the difference to the original model's inputs; then the scales are
    multiplied by the one gain that brings the outputs nearest to the original ones (correction.py).

    Args:
        gate_ups: of each expert the weights that make the inputs of down: the original ones to
            score one projection alone, the rounded ones to apply a plan.
    """
    weights = [expert.weights.down for expert in experts]
    by_neuron = any(expert.routed.neuron is not None for expert in experts)
    if by_neuron and rounding.needs_hessian:
        # A token has one input of down, the others are 0: the Hessian is diagonal, and there is no
        # error of one neuron that another could make up for.
        rounding = replace(rounding, quantizer="rtn")
    if not rounding.needs_hessian:
        return _round([(weight, None) for weight in weights], rounding, widths)
    inputs = [
        down_inputs(expert, gate_up.weight, rounding, gate_up.hidden)
        for expert, gate_up in zip(experts, gate_ups, strict=True)
    ]
    targets = [_target(*pair, rounding) for pair in zip(weights, inputs, strict=True)]
    rounded = _round(targets, rounding, widths, products_dtype(weights[0]))
    return [
        [one.rescaled(matrix, weight, factor) for matrix in matrices]
        for one, matrices, weight, (_, factor) in zip(
            inputs, rounded, weights, targets, strict=True
        )
    ]


def _gate_up_target(expert: RoutedExpert, rounding: Rounding) -> tuple[Tensor, Factor | None]:
    weight = expert.weights.gate_up
    if not rounding.needs_hessian:
        return weight, None
    return _target(weight, gate_up_inputs(expert, rounding), rounding)


def gate_up_inputs(expert: RoutedExpert, rounding: Rounding) -> Inputs:
    """Statistics of the inputs of gate and up."""
    return _gathered(expert.weights.gate_up, expert, rounding, _unchanged, _unchanged)


def down_inputs(
    expert: RoutedExpert, gate_up: Tensor, rounding: Rounding, known: Tensor | None = None
) -> Inputs:
    """Statistics of the inputs of `down`, which weights `gate_up` [R, H] make.

    Args:
        known: [T_e, I] these inputs for the expert's own tokens; None: not known.
    """
    bias = expert.weights.gate_up_bias
    now = partial(expert_hidden, expert.module, gate_up, bias=bias)
    original = partial(expert_hidden, expert.module, expert.weights.gate_up, bias=bias)
    return _gathered(expert.weights.down, expert, rounding, now, original, known)


def _gathered(
    weight: Tensor,
    expert: RoutedExpert,
    rounding: Rounding,
    now: ToMatrixInputs,
    original: ToMatrixInputs,
    known: Tensor | None = None,
) -> Inputs:
    """Statistics of a matrix's inputs on the tokens of the expert's Hessian.

    Args:
        now: gives the matrix's inputs from the expert's inputs once earlier layers are rounded.
        original: gives the matrix's inputs from the expert's inputs in the original model.
        known: [T_e, K] what `now` gives for the expert's own tokens; None: not known.
    """
    routed = expert.routed
    tokens, weights = hessian_tokens(routed, expert.layer, expert.number, rounding.tokens)
    if not torch.equal(tokens, expert.tokens):  # others too, or each once for several neurons
        known = None
    device = weight.device
    corrects = routed.original is not None
    inputs = Inputs(weight.shape[1], device, rounding.family, corrects, weight, len(tokens))

    def of_matrix(to_inputs: ToMatrixInputs, states: Tensor, some: Tensor) -> Tensor:
        x = to_inputs(routed.inputs(states, expert.number, some, device))
        return widened(x, weight.shape[1])

    for chunk in chunks(tokens):
        some = tokens[chunk]
        x = of_matrix(now, routed.hidden, some) if known is None else sent(known[chunk], device)
        before = None if routed.original is None else of_matrix(original, routed.original, some)
        inputs.add(x, before, rounding.token_weights(x, weights[chunk]))
    return inputs


def _target(weight: Tensor, inputs: Inputs, rounding: Rounding) -> tuple[Tensor, Factor]:
    """(weights to round, factor of the Hessian).

    The weights are corrected if `inputs` also gathered the inputs in the original model.
    """
    target = inputs.corrected(weight, rounding.damping, rounding.correction)
    return target, inputs.factor(rounding.damping)


def _round(
    targets: Sequence[tuple[Tensor, Factor | None]],
    rounding: Rounding,
    widths: Sequence[Sequence[float]],
    products: torch.dtype = torch.float32,
) -> list[list[Matrix]]:
    """Weights of one shape, each at each of its widths.

    Args:
        products: see `Unrounded`.
    """
    matrices = quantize_matrices(
        rounding.quantizer,
        [
            Unrounded(weight, rounding.codec(bits, weight.shape[1]), factor, products)
            for (weight, factor), of_one in zip(targets, widths, strict=True)
            for bits in of_one
        ],
    )
    in_turn = iter(matrices)
    return [[next(in_turn) for _ in of_one] for of_one in widths]


def _unchanged(x: Tensor) -> Tensor:
    return x
