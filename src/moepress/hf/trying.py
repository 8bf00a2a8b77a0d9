"""Find what a function of a model computes by trying it: random inputs, and what is close."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Of the numbers that are compared: sums in another order round one in some thousand to a neighbour;
# a function that rounds elsewhere, a tenth at least.
FEW = 0.02
CLOSE = 1e-5  # relative

MOST_TOKENS = 16  # of a call that a kernel in the place of a function takes


def random_numbers(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Normal numbers, the same on all devices, that do not touch torch's generators."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(device, dtype)


def disagreement(found: object, expected: object, dtype: torch.dtype) -> float:
    """The share of numbers that differ; inf where shapes, dtypes, or numbers by far, differ.

    Numbers that differ in the last bits of float32 count as equal: sums have another order. The
    host waits for the device.

    Args:
        dtype: to which numbers are rounded, of the result or between.
    """
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return math.inf
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    apart = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-6)
    if not bool((apart < 4 * torch.finfo(dtype).eps + CLOSE).all()):
        return math.inf
    return float((apart > CLOSE).double().mean())


def followed(tensors: Iterable[Tensor]) -> bool:
    """Whether gradients of one of the tensors are wanted."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
