"""Round the two projections of one expert: Hessians from its own tokens, then a quantizer.

Shared by scoring, which tries every width, and by quantizing, which takes the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from moepress.allocation.tensors import codec_for
from moepress.calibrate import hessian_tokens
from moepress.original.walk import Routed, chunks, expert_hidden
from moepress.recipe import Recipe
from moepress.rounding.methods import (
    Factor,
    Inputs,
    QuantizedMatrix,
    TrellisMatrix,
    needs_hessian,
    quantize_matrix,
)


def round_gate_up(
    weight: Tensor,
    routed: Routed,
    layer: int,
    expert: int,
    recipe: Recipe,
    quantizer: str,
    widths: Sequence[int],
) -> list[QuantizedMatrix | TrellisMatrix]:
    """The fused gate and up projection [2I, H] at each width; one factorisation serves all.

    Where `routed` has the original model's inputs, both projections make up for a part of the
    difference (rounding/correction.py).
    """
    if not needs_hessian(quantizer):
        return _round(weight, None, recipe, quantizer, widths)
    wanted, factor, _ = _prepared(weight, routed, layer, expert, recipe, lambda x: x, lambda x: x)
    return _round(wanted, factor, recipe, quantizer, widths)


def round_down(
    weight: Tensor,
    gate_up: Tensor,
    module: Any,
    routed: Routed,
    layer: int,
    expert: int,
    recipe: Recipe,
    quantizer: str,
    widths: Sequence[int],
    original_gate_up: Tensor | None = None,
) -> list[QuantizedMatrix | TrellisMatrix]:
    """The down projection [H, I] at each width.

    Where `routed` has the original model's inputs, it makes up for a part of the difference, and
    its scales for what that leaves of a common factor.

    Args:
        gate_up: [2I, H] weights that make its input: the original when one projection is scored
            alone, the rounded one when both are applied.
        module: the skeleton's experts module, for its gate function.
        original_gate_up: of the original model; None: `gate_up` is.
    """
    if not needs_hessian(quantizer):
        return _round(weight, None, recipe, quantizer, widths)
    inputs = partial(expert_hidden, module, gate_up)
    original = gate_up if original_gate_up is None else original_gate_up
    original_inputs = partial(expert_hidden, module, original)
    wanted, factor, known = _prepared(
        weight, routed, layer, expert, recipe, inputs, original_inputs
    )
    return [
        known.rescaled(matrix, weight, factor)
        for matrix in _round(wanted, factor, recipe, quantizer, widths)
    ]


def _prepared(
    weight: Tensor,
    routed: Routed,
    layer: int,
    expert: int,
    recipe: Recipe,
    inputs: Callable[[Tensor], Tensor],
    original_inputs: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Factor, Inputs]:
    """The weight to round, corrected if the original's inputs are known; factored Hessian; inputs.

    Args:
        inputs, original_inputs: make the projection's inputs from the expert's, now and in the
            original model.
    """
    tokens, counts = hessian_tokens(routed, layer, expert, recipe)
    device, original = weight.device, routed.original
    known = Inputs(weight.shape[1], device, recipe.expert_codec, original is not None)
    for part in chunks(tokens):
        some, count = tokens[part], counts[part].to(device)
        x = inputs(routed.hidden[some].to(device))
        was = None if original is None else original_inputs(original[some].to(device))
        known.add(x, was, count)
    wanted = known.corrected(weight, recipe.damping, recipe.correction)
    return wanted, known.factor(recipe.damping), known


def _round(
    weight: Tensor, factor: Factor | None, recipe: Recipe, quantizer: str, widths: Sequence[int]
) -> list[QuantizedMatrix | TrellisMatrix]:
    codecs = [
        codec_for(bits, weight.shape[1], recipe.group_size, recipe.expert_codec) for bits in widths
    ]
    return [quantize_matrix(quantizer, weight, codec, factor) for codec in codecs]
