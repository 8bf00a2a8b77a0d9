"""How much larger the errors of rounding are on tokens that its Hessian has not seen.

The error of column k costs what is left of its inputs after a ridge regression on the columns
behind it, which make up for the rest. On the T tokens of the Hessian that is too little: the
regression has fitted them. A cost should be that of other tokens: those that the model will read.
Otherwise the matrices with the most columns for their tokens look cheap (docs/log.md#held-out).

A token of weight c_t draws the fit towards itself: its residual is 1 / (1 + c_t q) of what a fit
without it would leave, a number s_k in the mean square. With inputs of tokens that are alike, q is
the same for all tokens. The m_k degrees of freedom that are fitted tell it:

    sum_t c_t q / (1 + c_t q) = m_k,        ||u_k||^2 = s_k sum_t c_t / (1 + c_t q)^2

u_k the residuals of column k, times the roots of the weights. If all weights are equal, that is
generalized cross-validation (Golub, Heath and Wahba 1979), s_k T = ||u_k||^2 / (1 - m_k / T)^2.
Routing weights are not: then the heaviest tokens are fitted far better than the others
(docs/log.md#uneven-weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.rounding.factor import Factor
from moepress.sending import sent

POINTS = 128  # of q at which sums over tokens are computed
LEAST = 1e-9  # of the largest q


def held_out(factor: Factor, weights: Tensor, own: int | None = None) -> Tensor:
    """The ratio of root mean squared errors: on other tokens, over those of the Hessian.

    Args:
        factor: of the Hessian of T tokens.
        weights: [T] of the tokens, at least 0, on the CPU.
        own: how many of them the errors are measured on, the first; None: all.

    Returns:
        A float32 number on the device of the factor, which nobody waits for here.
    """
    total = weights.double().sum().item()
    if not total:
        return factor.curvature.new_ones(())
    fitted = factor.fitted().double()  # by each column, for the columns before it
    energy = fitted * factor.curvature.double()  # ||u_k||^2
    behind = fitted.flip(0).cumsum(0).flip(0) - fitted  # m_k
    # q is at most a token's |x|^2 over what the damping adds to the diagonal.
    largest = len(fitted) / (factor.damping * total)
    points = largest * torch.logspace(0, 1, POINTS, base=LEAST, dtype=torch.float64).flip(0)
    of_own = _sums(weights[:own], points)
    of_all = of_own if own is None else of_own + _sums(weights[own:], points)
    # Roots of the last sums fall in proportion to m_k where weights are equal.
    table = sent(torch.stack([of_all[0], of_all[1].sqrt(), of_own[1].sqrt()]), fitted.device)
    all_left, own_left = _between(table[0], table[1:], behind).square()
    unseen = energy / all_left  # s_k
    seen = (unseen * own_left).sum()
    expected = unseen.sum() * weights[:own].double().sum().item()
    return torch.where(seen > 0, (expected / seen).sqrt(), 1.0).float()


def _sums(weights: Tensor, points: Tensor) -> Tensor:
    """Sums over tokens of c q / (1 + c q) and of c / (1 + c q)^2, [2, P], at each q."""
    # Rounded to 8 bits there are few different ones.
    values, counts = torch.unique(weights.bfloat16().double(), return_counts=True)
    drawn = values[:, None] * points
    terms = torch.stack([drawn / (1 + drawn), values[:, None] / (1 + drawn).square()])
    return torch.einsum("t,stp->sp", counts.double(), terms)


def _between(places: Tensor, table: Tensor, wanted: Tensor) -> Tensor:
    """Values [S, K] of functions, known as table [S, P] at rising places [P], between these."""
    after = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    before = after - 1
    step = (places[after] - places[before]).clamp(min=torch.finfo(places.dtype).tiny)
    share = ((wanted - places[before]) / step).clamp(0, 1)
    return torch.lerp(table[:, before], table[:, after], share.expand(len(table), -1))
