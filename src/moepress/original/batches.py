"""How many tokens are in memory at a time, and where arrays of all tokens live."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

BATCH_TOKENS = 4096  # tokens that go through a layer, or an expert, at a time
LOGIT_TOKENS = 256  # tokens whose logits are held at a time while gradients go through them
LOGITS = 1 << 28  # logits of one evaluation batch: half a GB in bfloat16, one GB in float32
IN_MEMORY = 1 << 30  # bytes; larger arrays of states live in a memory-mapped temporary file


def batches(ids: Tensor, tokens: int | None = None) -> list[slice]:
    """Slices of sequences [S, L], each of at most `tokens` tokens or of one sequence.

    Args:
        tokens: None: BATCH_TOKENS.
    """
    sequences, length = ids.shape
    step = max(1, (BATCH_TOKENS if tokens is None else tokens) // length)
    return [slice(i, min(i + step, sequences)) for i in range(0, sequences, step)]


def chunks(tokens: Tensor) -> Iterator[slice]:
    """Slices of at most BATCH_TOKENS tokens; none for no tokens."""
    for start in range(0, len(tokens), BATCH_TOKENS):
        yield slice(start, min(start + BATCH_TOKENS, len(tokens)))


def position_chunks(length: int) -> Iterator[Tensor]:
    """The positions 0 .. length - 1 of a sequence, at most LOGIT_TOKENS at a time."""
    for start in range(0, length, LOGIT_TOKENS):
        yield torch.arange(start, min(start + LOGIT_TOKENS, length))


def logit_tokens(vocabulary: int) -> int:
    """Number of tokens whose logits are held at a time in an evaluation."""
    return min(BATCH_TOKENS, LOGITS // vocabulary)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor; a large one is mapped from an unnamed temporary file."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="moepress-") as file:
        flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    return flat.view(shape)  # the mapping outlives the name
