"""Tokens whose inputs are far larger than all others: massive activations (arXiv:2402.17762).

In most models one expert, or one dense MLP, gives the first token of a text a state a hundred or a
thousand times as large as others have (super experts, arXiv:2507.23279). The inputs of its `down`
are far larger at that token, too. Their squares would make up nearly all of a Hessian: damping,
which follows the mean, would hide all other tokens, and rounding would fit that one alone. But its
error costs no more than that of any token: a norm comes next, so what counts is error over size. It
therefore counts as a token of LARGEST times the usual size (docs/log.md#massive).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.sending import sent

# Times the median norm. Inputs right behind a norm have about one size: none is as large.
LARGEST = 8.0


def bounded(x: Tensor, weight: Tensor | None) -> Tensor:
    """Weights c_t min(1, (LARGEST m / norm(x_t))^2), m the median norm: [T] float32 on x's device.

    Args:
        x: [T, K] some inputs.
        weight: [T], c_t; None: 1.
    """
    size: Tensor = torch.linalg.vector_norm(x.detach(), dim=1).float()
    if not len(size):
        return size
    # An input of zeros gives infinity, and counts in full.
    share: Tensor = (LARGEST * size.median() / size).nan_to_num(nan=1.0).clamp(max=1).square()
    return share if weight is None else share * sent(weight, x.device).float()
