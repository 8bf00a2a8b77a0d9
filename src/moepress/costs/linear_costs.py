"""The cost of each open linear at each width: its squared error trace(E H E^T) times sensitivity.

The Hessian gives the squared error of all tokens together. Every token is assumed to have an equal
share of it, so the cost on a text is the squared error times the sum of the text's sensitivities,
over the number of all tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moepress.costs.texts import Texts
from moepress.original.architectures import reads_experts
from moepress.original.walk import Walk
from moepress.recipe import fallback_width
from moepress.rounding.factor import Factor
from moepress.rounding.held_out import held_out
from moepress.rounding.linear import linear_inputs, output_cost, round_linear_to_all
from moepress.rounding.noise import draw, draw_ahead, forget_draws, noisy_weights
from moepress.rounding.options import Rounding

logger = logging.getLogger(__name__)


def score_linears(
    walk: Walk,
    layer: int,
    modules: Mapping[str, nn.Linear],
    widths: Sequence[int],
    rounding: Rounding,
    sensitivity: Mapping[str, Tensor],
    texts: Texts,
    experts_output: Tensor | None = None,
) -> Tensor:
    """Cost [M, D, W] float64 of each open linear of a layer on each text, at each width.

    Args:
        modules: the open linears, by parameter name.
        sensitivity: s [T] of each linear's output, by parameter name.
        experts_output: [T, H] of the layer's routed experts: the linears that read it are scored;
            None: all others are. The costs of those that are not scored are 0.
    """
    after = experts_output is not None
    scored = {name: module for name, module in modules.items() if reads_experts(name) == after}
    if rounding.draws and walk.source.device.type == "cuda":  # while the card gathers Hessians
        for name, module in scored.items():
            draw_ahead(module.weight.shape, rounding.tokens.seed, name)
    factors: dict[str, Factor] = {}
    larger: dict[str, Tensor | None] = {}
    for names, inputs in linear_inputs(
        walk, layer, scored, rounding, experts_output=experts_output
    ):
        factor = inputs.factor(rounding.damping)
        factors |= dict.fromkeys(names, factor)
        larger |= dict.fromkeys(names, held_out(factor, inputs.weights) if rounding.draws else None)
    costs = torch.zeros(len(modules), texts.count, len(widths), dtype=torch.float64)
    for row, name in enumerate(modules):
        if name not in scored:
            continue
        s = sensitivity.get(name, torch.zeros(0)).double()
        if len(s) != len(texts.of_token) or not s.sum() > 0:
            fallback = _fallback_only(name, widths)
            costs[row] = fallback if walk.ranks.first else 0
            continue
        if name not in factors:  # another rank has it
            continue
        weight = walk.source.current(name)
        by_text = texts.sums(s) / len(texts.of_token)
        offered = rounded_weights(name, weight, widths, factors[name], rounding, larger[name])
        for option, rounded in enumerate(offered):
            cost = output_cost(weight, rounded, factors[name], rounding.family)
            costs[row, :, option] = by_text * cost
    forget_draws()
    walk.ranks.sum_up(costs)
    return costs


def rounded_weights(
    name: str,
    weight: Tensor,
    widths: Sequence[int],
    factor: Factor,
    rounding: Rounding,
    larger: Tensor | None,
) -> Iterator[Tensor]:
    """The weight [N, K] at every width, in its own dtype.

    It is rounded, or gets the error that trellis rounding would leave. Scalar codes are rounded.

    Args:
        name: of the parameter.
        larger: a number that drawn errors are multiplied by; None: 1.
    """
    codecs = [rounding.codec(bits, weight.shape[1]) for bits in widths]
    drawn = [codec.bits for codec in codecs if rounding.draws and codec.family == "trellis"]
    noise = draw(weight.shape, rounding.tokens.seed, name) if drawn else torch.zeros(0)
    noisy = noisy_weights(weight, drawn, factor, noise, larger=larger)
    rest = [codec for codec in codecs if codec.bits not in drawn]
    rounded = iter(round_linear_to_all(weight, rest, factor, rounding))
    for codec in codecs:
        if codec.bits in drawn:
            yield next(noisy).to(weight.dtype)
        else:
            yield next(rounded).dequantize(weight.dtype)


def _fallback_only(name: str, widths: Sequence[int]) -> Tensor:
    """Costs [W] float64: 0 at the fallback width, infinite at all others, so that it is chosen."""
    fallback = fallback_width(widths)
    logger.warning(
        "no gradient of the loss reaches every token of %s: its cost is unknown, it gets %d bits",
        name, fallback,
    )  # fmt: skip
    costs = torch.full((len(widths),), torch.inf, dtype=torch.float64)
    costs[list(widths).index(fallback)] = 0
    return costs
