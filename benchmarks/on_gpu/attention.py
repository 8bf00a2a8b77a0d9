"""Attention of decoded tokens on the card, against plain PyTorch on the CPU in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from moepress import kernels
from moepress.kernels import reference
from on_gpu.card import Card
from on_gpu.case import Case, Row
from on_gpu.compare import HALF, Worst

ATTENTION = (  # batches, query heads, key heads, tokens, positions, size of a head
    (1, 32, 8, 1, 512, 128), (2, 8, 1, 1, 100, 64), (1, 24, 2, 1, 333, 128), (2, 4, 2, 3, 65, 256),
    (1, 4, 4, 1, 1, 40),
)  # fmt: skip


def cases(card: Card) -> Iterator[Case]:
    yield Case("attention", partial(check_attention, card), 60)


def check_attention(card: Card) -> list[Row]:
    """Rows with and without a mask, and one that sees nothing. Errors: of a head."""
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for batches, heads, shared, tokens, positions, size in ATTENTION:
        q = torch.randn(batches, heads, tokens, size, generator=generator)
        k, v = torch.randn(2, batches, positions, shared, size, generator=generator).transpose(2, 3)
        mask = torch.rand(batches, 1, tokens, positions, generator=generator) < 0.6
        mask[..., 0] = True
        mask[0, 0, 0] = False
        for dtype, given in ((d, m) for d in HALF for m in (None, mask)):
            here = [x.to(dtype) for x in (q, k, v)]
            exact = reference.attention(*(x.double() for x in here), given, size**-0.5)
            there = [x.to(card.device) for x in here]
            found = kernels.attention(
                *there, None if given is None else given.to(card.device), size**-0.5
            )
            label = f"{batches} x {heads} ({shared}) heads of {size}, {positions} keys, {dtype}"
            worst(label, found, exact, 1e-5, dtype)
            if given is not None:
                worst.expect(label + ": zeros", not found[0, 0].any())
    return worst.rows()
