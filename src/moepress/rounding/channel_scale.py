"""Scales of a matrix's inputs that make it lose least when it is rounded.

(W / s)(s x) = W x: inputs can be scaled, and the columns of the weights scaled back. Rounding
leaves about the same error in all columns, so the loss grows by

    mean over columns of e / s^2   times   mean over columns of D s^2,

with e the mean square of a column's weights and D the variance of its inputs that the other inputs
do not tell. It is least at s = (e / D)^(1/4). Where a norm scales channels unevenly, that is much
less than without s. Each row is rounded with a scale of its own, and what reads it may scale it
back (keys a large query, `down` a large up): e is that of rows divided by their norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moepress.original.batches import BATCH_TOKENS

LEAST_GAIN = 0.02  # of the loss: less is not worth scaling
CHANCE = 4  # over the number of tokens: what is gained on these by chance, and more
RIDGE = 0.1  # added to the correlations of the inputs; D of few tokens is less exact, not smaller
TOKENS = 8192  # that are enough for the correlations
OCTAVES = 12  # at most so many, up or down: the scales stay numbers of float16


def best_scale(weights: Iterable[Tensor], parts: Sequence[Tensor]) -> tuple[Tensor, float]:
    """`channel_scale` [H] on the CPU, and its gain without what may be gained by chance.

    Args:
        weights: matrices [n, H]; they may have more columns, which are padding.
        parts: inputs [t, H].
    """
    x = torch.cat(list(parts))
    energy = mean_squares(map(_with_rows_of_one, weights))[: x.shape[1]]
    scale, gain = channel_scale(energy.cpu(), own_variance(x).cpu())
    return scale, gain - CHANCE / len(x)


def channel_scale(energy: Tensor, variance: Tensor) -> tuple[Tensor, float]:
    """s [H] float32 of bfloat16 numbers, and the share of the loss that it gains.

    The mean square of the inputs stays about as it is.

    Args:
        energy: [H] e, mean squares of the columns of the weights.
        variance: [H] D, `own_variance` of the inputs.
    """
    found = torch.ones(len(energy), dtype=torch.float64)
    used = (energy > 0) & (variance > 0)
    if not used.any():
        return found.float(), 0.0
    e, d = energy[used].double(), variance[used].double()
    scale = (e / d) ** 0.25
    scale *= (d.mean() / (d * scale**2).mean()).sqrt()
    gain = 1 - (e / scale**2).mean() * (d * scale**2).mean() / (e.mean() * d.mean())
    found[used] = scale.clamp(2.0**-OCTAVES, 2.0**OCTAVES)
    return found.bfloat16().float(), float(gain)


def own_variance(x: Tensor) -> Tensor:
    """D [H] float32: what the other channels do not tell of the mean square of each.

    1 / diag of the inverse of the correlations, times the mean squares; so D of channels that are
    scaled is scaled by the square.

    Args:
        x: [t, H] inputs.
    """
    width = x.shape[1]
    products = torch.zeros(width, width, device=x.device)
    parts = torch.split(x, BATCH_TOKENS)
    size = mean_squares(parts).float().clamp(min=torch.finfo(torch.float32).tiny)
    for some in parts:
        part = some.float() / size.sqrt()
        products.addmm_(part.T, part)
    products /= len(x)
    products.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(products).L)
    return size / inverse.diagonal()


def _with_rows_of_one(weight: Tensor) -> Tensor:
    """A matrix, its rows divided by their norms; rows of zeros stay."""
    size = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64)
    return weight / torch.where(size > 0, size, 1.0).float()


def mean_squares(parts: Iterable[Tensor]) -> Tensor:
    """Mean squares [H], in float64, of the columns of matrices [n, H]."""
    sums, rows = torch.zeros(()), 0
    for part in parts:
        sums = sums.to(part.device) + part.float().square().sum(0, dtype=torch.float64)
        rows += len(part)
    return sums / rows
