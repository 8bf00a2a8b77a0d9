"""How much larger the errors of rounding are on tokens that its Hessian has not seen.

The error of column k costs what is left of its inputs after a ridge regression on the columns
behind it, which make up for the rest. On the T tokens of the Hessian that is too little: the
regression has fitted them. With m_k of T degrees of freedom fitted, generalized cross-validation
(Golub, Heath and Wahba 1979) estimates the squared residuals on other tokens as

    ||u_k||^2 / (1 - m_k / T)^2                     u_k: residuals of column k on the T tokens

A cost should be that of other tokens: those that the model will read. Otherwise the matrices with
the most columns for their tokens look cheap (docs/log.md#held-out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.rounding.factor import Factor

LEAST = 0.05  # of 1 - m / T. T is the effective number of tokens, and may be smaller than m


def held_out(factor: Factor, tokens: float) -> Tensor:
    """The ratio of root mean squared errors: on other tokens, over those of the Hessian.

    Args:
        factor: of the Hessian of T tokens.
        tokens: T, effective (hessian.py `TokenWeights`).

    Returns:
        A float32 number on the device of the factor, which nobody waits for here.
    """
    if not tokens:
        return factor.curvature.new_ones(())
    fitted = factor.fitted().double()  # by each column, for the columns before it
    energy = fitted * factor.curvature.double()  # ||u_k||^2
    behind = fitted.flip(0).cumsum(0).flip(0) - fitted  # m_k
    left = (1 - behind / tokens).clamp(min=LEAST)
    total = energy.sum()
    return torch.where(total > 0, ((energy / left.square()).sum() / total).sqrt(), 1.0).float()
