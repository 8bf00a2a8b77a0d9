"""SHA-256 of tensors; of large ones as a tree, by several threads.

One thread hashes one or two GB a second. So the bytes of a tensor of more than PIECE bytes are cut
in pieces, and in their place the digests of the pieces are hashed, in order: a tree of two levels.
Which of the two it is follows from the shape, which is hashed first, so no two different tensors
have the same input. Nothing is copied: pieces are views of the tensor's memory, which may be mapped
from a file that is read as it is hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PIECE = 16 << 20  # bytes


def tensors_digest(tensors: Mapping[str, Tensor], threads: int | None = None) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    Args:
        tensors: of any dtypes and shapes. Those that are on a card or not contiguous are copied.
        threads: which hash the pieces; None: as many as the machine has cores, and some more. The
            digest does not depend on it.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(threads, "moepress-hash") as pool:  # starts threads as they are needed
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            if len(content) <= PIECE:
                digest.update(content)
                continue
            pieces = (content[start : start + PIECE] for start in range(0, len(content), PIECE))
            for one in pool.map(_piece_digest, pieces):
                digest.update(one)
    return digest.hexdigest()


def _piece_digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()  # hashing lets other threads run
