"""Batches and chunks of tokens, and storage for arrays of all tokens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.errors import CheckpointError
from moepress.memory import free_memory
from moepress.pinned import pinned_empty

BATCH_TOKENS = 4096  # tokens that go through a layer, or an expert, at a time
CARD_BATCHES = 2  # of these go through a layer together on a card: Python takes as long for both
LOGIT_TOKENS = 256  # tokens whose logits are held at a time while gradients go through them
LOGITS = 1 << 28  # logits of an evaluation batch: half a GB in bfloat16, one GB in float32
SHARE = 0.45  # of a card's free memory, that an array of all tokens may take
SHARE_IN_ORDER = 0.12  # the same for an array that is read in order, which costs less on the host
IN_MEMORY = 1 << 30  # bytes; larger arrays of states are memory-mapped temporary files
PIECE = 4 << 20  # bytes of zeros that are written at a time


def batches(ids: Tensor, tokens: int | None = None) -> list[slice]:
    """Slices of sequences [S, L] of at most `tokens` tokens, but of at least one sequence.

    Args:
        tokens: None: BATCH_TOKENS.
    """
    sequences, length = ids.shape
    step = max(1, (BATCH_TOKENS if tokens is None else tokens) // length)
    return [slice(i, min(i + step, sequences)) for i in range(0, sequences, step)]


def batch_tokens(device: torch.device) -> int:
    """Tokens that go through a layer at a time on a device."""
    return BATCH_TOKENS * (CARD_BATCHES if device.type == "cuda" else 1)


def chunks(tokens: Tensor) -> Iterator[slice]:
    """Slices of at most BATCH_TOKENS tokens; none for no tokens."""
    for start in range(0, len(tokens), BATCH_TOKENS):
        yield slice(start, min(start + BATCH_TOKENS, len(tokens)))


def position_chunks(length: int) -> Iterator[Tensor]:
    """The positions 0 .. length - 1 of a sequence, at most LOGIT_TOKENS at a time."""
    for start in range(0, length, LOGIT_TOKENS):
        yield torch.arange(start, min(start + LOGIT_TOKENS, length))


def logit_tokens(vocabulary: int) -> int:
    """Number of tokens of an evaluation batch, for a vocabulary of that size."""
    return min(BATCH_TOKENS, LOGITS // vocabulary)


def empty(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | None = None,
    share: float = SHARE,
) -> Tensor:
    """An uninitialised tensor, on a card if it takes at most a share of the card's free memory.

    Else it is on the CPU: in memory that a card reads fast, if there is much more of it. Without a
    card a large one is mapped from a temporary file without a name.

    Args:
        device: None: the CPU.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if device is not None and device.type == "cuda":
        if size <= share * free_memory(device):
            return torch.empty(shape, dtype=dtype, device=device)
        if (pinned := pinned_empty(shape, dtype)) is not None:
            return pinned
    if size <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="moepress-") as file:
        _reserve(file, size)
        flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    return flat.view(shape)  # the file has no name any more; it lives as long as the mapping


def _reserve(file: Any, size: int) -> None:
    """Reserve the bytes of a file. Without that, writing to its mapping on a full disk is a crash.

    Raises:
        CheckpointError: the disk has too little space.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            _write_zeros(file.fileno(), size)
    except OSError as error:
        folder = Path(file.name).parent
        raise CheckpointError(
            f"{folder} has no room for a temporary file of {size:,} bytes ({error.strerror}). Free "
            "some space, or set TMPDIR to a folder on another disk; everything finished is kept."
        ) from error


def _write_zeros(fd: int, size: int) -> None:
    zeros = memoryview(bytes(min(size, PIECE)))
    while size:
        size -= os.write(fd, zeros[:size])
