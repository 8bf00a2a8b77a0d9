"""The op `moepress::attention` on CPUs (attention.cpp), for few queries over many keys."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels import reference
from moepress.kernels.cpu import interface
from moepress.kernels.cpu.interface import NUMBERS

BOOL = 3  # kMoepressBool
MOST_SIZE = 512  # kAttentionSize of attention.h
MOST_TOKENS = 64  # more would be cheaper as products of matrices


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes such tensors, whose shapes fit each other."""
    return (
        q.dtype in NUMBERS
        and q.dtype == k.dtype == v.dtype
        and 0 < q.shape[3] <= MOST_SIZE
        and q.shape[2] <= MOST_TOKENS
        and (mask is None or mask.dtype == torch.bool or mask.dtype in NUMBERS)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The op `moepress::attention`. What the kernel does not take goes to the reference.

    Queries, keys and values are read where they are if the numbers of a position follow each other;
    else they are copied. Masks are read as they are.
    """
    if not takes(q, k, v, mask):
        return reference.attention(q, k, v, mask, scale)
    q, k, v = _readable(q), _readable(k), _readable(v)
    batches, query_heads, tokens, size = q.shape
    y = torch.empty((batches, tokens, query_heads, size), dtype=q.dtype, device=q.device)
    interface.call(
        "moepress_attention",
        q.data_ptr(),
        *q.stride()[:3],
        k.data_ptr(),
        *k.stride()[:3],
        v.data_ptr(),
        *v.stride()[:3],
        *_mask(mask),
        batches,
        query_heads,
        k.shape[1],
        tokens,
        k.shape[2],
        size,
        scale,
        NUMBERS[q.dtype],
        torch.get_num_threads(),
        y.data_ptr(),
    )
    return y


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _mask(mask: Tensor | None) -> tuple[int | None, ...]:
    """Address, kind of numbers and strides; a dimension of 1 is every one."""
    if mask is None:
        return None, BOOL, 0, 0, 0, 0
    strides = (s if n > 1 else 0 for n, s in zip(mask.shape, mask.stride(), strict=True))
    kind = BOOL if mask.dtype == torch.bool else NUMBERS[mask.dtype]
    return mask.data_ptr(), kind, *strides
