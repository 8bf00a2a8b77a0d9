"""Equal experts whose `down` is easier to round: the sizes of their inner channels are balanced.

Where h = act(g) * u, rows of up divided by s_i and columns of `down` times s_i leave the expert as
it is, for any s > 0. Rows of up have scales of their own, so they are rounded as well as before. In
`down`, rounding leaves about the same error in all columns, however much their inputs vary. So
columns of strong inputs should be larger than others, and those of weak inputs smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.blocks.form import apply_gate
from moepress.original.experts import RoutedExpert, expert_hidden
from moepress.rounding.options import Rounding
from moepress.rounding.tokens import hessian_tokens
from moepress.sending import rows_sent

TOKENS = 512  # that the strength of channels is measured on; the eighth root of it counts
# Energy of a column of `down` as a power of what its channel contributes to the output: of 1/8,
# 1/4, 3/8 and 1/2 the one with the least predicted error (docs/log.md#balance).
EXPONENT = 0.25
WEAKEST = 1e-4  # of the mean contribution: a channel that is weaker here may be strong elsewhere


def balanced(expert: RoutedExpert, rounding: Rounding) -> RoutedExpert:
    """The expert with balanced channels, or the same where its function does not allow it."""
    inner = expert.weights.down.shape[1]
    gated = len(expert.weights.gate_up) == 2 * inner and expert.routed.neuron is None
    biased = expert.weights.gate_up_bias is not None  # biases are stored as they are
    if not rounding.balances or not gated or biased or not _up_multiplies(expert):
        return expert
    gate_up, down = expert.weights.gate_up, expert.weights.down
    scale = channel_scales(_strengths(expert, rounding), _mean_squares(down))
    scale = scale.bfloat16().float()  # sums in another order, of a card say, give the same
    up = (gate_up[inner:].float() / scale[:, None]).to(gate_up)
    weights = expert.weights._replace(
        gate_up=torch.cat([gate_up[:inner], up]), down=(down.float() * scale).to(down)
    )
    return expert.with_weights(weights)


def channel_scales(strengths: Tensor, energies: Tensor) -> Tensor:
    """s [I], which columns of `down` are multiplied by: their energies become p^EXPONENT.

    p = strengths * energies is what a channel contributes to the output. It does not depend on s,
    so neither does the result, but for a common factor: the mean energy of the columns stays.

    Args:
        strengths: [I] float64 mean squares of the inputs of `down`.
        energies: [I] float64 mean squares of its columns.
    """
    contributions = strengths * energies
    used = (contributions > 0) & contributions.isfinite()
    if not used.any():
        return torch.ones_like(energies)
    mean = contributions[used].mean()
    wanted = contributions.clamp(min=WEAKEST * mean) ** EXPONENT
    wanted *= energies[used].sum() / wanted[used].sum()
    return torch.where(used, (wanted / energies).sqrt(), 1.0)


def _strengths(expert: RoutedExpert, rounding: Rounding) -> Tensor:
    """[I] float64 weighted mean squares of the inputs of `down`, on some tokens of its Hessian."""
    routed, weights = expert.routed, expert.weights
    tokens, weight = hessian_tokens(routed, expert.layer, expert.number, rounding.tokens)
    some = slice(None, None, max(1, len(tokens) // TOKENS))
    x = rows_sent(routed.hidden, tokens[some], weights.down.device)
    scale = routed.input_scale(expert.number, tokens[some])
    x = x if scale is None else x * scale.to(x)
    hidden = expert_hidden(expert.module, weights.gate_up, x).float()
    weight = weight[some] / weight[some].mean()
    return _mean_squares(hidden * weight.sqrt().to(hidden)[:, None])


def _mean_squares(x: Tensor) -> Tensor:
    """[K] float64 of the columns of x [N, K]. In float32 they would differ with the threads."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)
    return norm.square() / len(x)


def _up_multiplies(expert: RoutedExpert) -> bool:
    """Whether the inputs of `down` are the outputs of up times something: without limits, say.

    Products with 2 are exact, so the function is asked, at numbers that limits would show at.
    """
    near = torch.linspace(-8, 8, 33, device=expert.weights.down.device)
    values = torch.cat([near, 1000 * near])
    products = torch.cartesian_prod(values, values)
    twice = products * torch.tensor([1.0, 2.0], device=products.device)
    module = expert.module
    return torch.equal(apply_gate(module, twice), 2 * apply_gate(module, products))
