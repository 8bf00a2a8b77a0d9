"""The tokens that the Hessian of a routed expert is made of, and the weight of each.

They are the tokens that chose the expert. An expert with few tokens borrows others of its layer, so
that errors along input directions that none of its own tokens has still cost something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.original.experts import Routed

# Weight of a borrowed token, relative to the mean weight of the expert's own tokens. Small, because
# the expert rarely gets such tokens: they only give directions without own tokens a cost above 0.
BORROWED_WEIGHT = 0.1


@dataclass(frozen=True)
class TokenPolicy:
    """How the tokens of an expert's Hessian are chosen and weighted."""

    by_routing_weight: bool  # own tokens have weight g^2; else 1, as in the paper
    floor: int  # an expert with fewer tokens borrows others of its layer, up to this many
    seed: int  # of the choice of borrowed tokens


def hessian_tokens(
    routed: Routed, layer: int, expert: int, policy: TokenPolicy
) -> tuple[Tensor, Tensor]:
    """The tokens of an expert's Hessian, and their weights.

    H = sum_t c_t x_t x_t^T with c = g^2, where g is the routing weight: the error of the MoE
    block's output is g (f(x) - f_b(x)), and rounding should keep its square small. Without
    `by_routing_weight` c = 1, the H of the paper. Where the routing weight scales the inputs of
    experts, c = 1 too: it is in x already. Borrowed tokens are drawn at random; the weight
    of each is BORROWED_WEIGHT times the mean weight of the expert's own tokens.

    Returns:
        Tokens [T_h] int64 and weights c [T_h] float32.
    """
    tokens, places = routed.of(expert)
    gate = routed.weight[tokens, places]
    weighted = policy.by_routing_weight and not routed.scales_input
    weights = gate.square() if weighted else torch.ones_like(gate)
    if routed.neuron is not None:  # a token has one input, however many neurons it chose
        tokens, own = torch.unique(tokens, return_inverse=True)
        weights = torch.zeros(len(tokens)).index_add_(0, own, weights)
    missing = min(policy.floor, len(routed.hidden)) - len(tokens)
    if missing <= 0:
        return tokens, weights
    free = torch.ones(len(routed.hidden), dtype=torch.bool)
    free[tokens] = False
    others = free.nonzero().flatten()
    generator = torch.Generator().manual_seed(policy.seed * 1_000_003 + layer * 10_007 + expert)
    borrowed = others[torch.randperm(len(others), generator=generator)[:missing]]
    each = BORROWED_WEIGHT * (weights.mean() if len(tokens) else torch.tensor(1.0))
    return torch.cat([tokens, borrowed]), torch.cat([weights, each.expand(len(borrowed))])
