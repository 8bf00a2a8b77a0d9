"""Random queries, keys and angles for the tests of rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int]  # batches, heads of q, of k, tokens, size, columns


def drawn_heads(sizes: Sizes, dtype: torch.dtype, angles: torch.dtype) -> tuple[Tensor, ...]:
    """q, k of a dtype, and cos, sin of another."""
    torch.manual_seed(0)
    batches, queries, keys, tokens, size, columns = sizes
    q, k = (torch.randn(batches, heads, tokens, size).to(dtype) for heads in (queries, keys))
    cos, sin = torch.randn(2, batches, tokens, columns).to(angles)
    return q, k, cos, sin
