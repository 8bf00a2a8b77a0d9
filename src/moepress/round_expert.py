"""Round the two projections of one expert: Hessians from its own tokens, then a quantizer.

Shared by scoring, which tries every width, and by quantizing, which takes the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from moepress.calibrate import hessian_tokens
from moepress.kernels.trellis import rotate
from moepress.layout import codec_for
from moepress.quantizers import (
    Factor,
    Hessian,
    QuantizedMatrix,
    TrellisMatrix,
    needs_hessian,
    quantize_matrix,
)
from moepress.recipe import Recipe
from moepress.walk import Routed, chunks, expert_hidden


def round_gate_up(
    weight: Tensor,
    routed: Routed,
    layer: int,
    expert: int,
    recipe: Recipe,
    quantizer: str,
    widths: Sequence[int],
) -> list[QuantizedMatrix | TrellisMatrix]:
    """The fused gate and up projection [2I, H] at each width; one factorisation serves all."""
    factor = None
    if needs_hessian(quantizer):
        factor = _factor(weight, routed, layer, expert, recipe, lambda x: x)
    return _round(weight, factor, recipe, quantizer, widths)


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
) -> list[QuantizedMatrix | TrellisMatrix]:
    """The down projection [H, I] at each width.

    Args:
        gate_up: [2I, H] weights that make its input: the original when one projection is scored
            alone, the rounded one when both are applied.
        module: the skeleton's experts module, for its gate function.
    """
    factor = None
    if needs_hessian(quantizer):
        inputs = partial(expert_hidden, module, gate_up)
        factor = _factor(weight, routed, layer, expert, recipe, inputs)
    return _round(weight, factor, recipe, quantizer, widths)


def _factor(
    weight: Tensor,
    routed: Routed,
    layer: int,
    expert: int,
    recipe: Recipe,
    inputs: Callable[[Tensor], Tensor],
) -> Factor:
    """The factored Hessian of a projection; `inputs` makes its inputs from the expert's."""
    tokens, counts = hessian_tokens(routed, layer, expert, recipe)
    hessian = Hessian(weight.shape[1], weight.device)
    for part in chunks(tokens):
        x = inputs(routed.hidden[tokens[part]].to(weight.device))
        if recipe.expert_codec == "trellis":
            x = rotate(x)
        hessian.add(x, counts[part].to(weight.device))
    return hessian.factor(recipe.damping)


def _round(
    weight: Tensor, factor: Factor | None, recipe: Recipe, quantizer: str, widths: Sequence[int]
) -> list[QuantizedMatrix | TrellisMatrix]:
    codecs = [
        codec_for(bits, weight.shape[1], recipe.group_size, recipe.expert_codec) for bits in widths
    ]
    return [quantize_matrix(quantizer, weight, codec, factor) for codec in codecs]
