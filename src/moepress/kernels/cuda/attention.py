"""The op `moepress::attention`: few queries over many keys, in two launches.

attention.cu (float32: attention_plain.cu) takes splits of the positions, attention_merge.cu puts
them together. Heads of 64, 128, 192 and 256 numbers are fast in bfloat16 and float16; other sizes
cost as much as the next of these. float32 multiplies without tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.kernels import reference
from moepress.kernels.cuda.launch import DTYPES, Argument, launcher_for, strided

THREADS = 128
TILE = 64  # positions
MOST_SIZE = 256
MOST_SPLITS = 128
MOST_POSITIONS = 1 << 30
MOST_ROWS = 1 << 16  # queries; grids have at most 65535 blocks in some directions
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
BOOL = 3  # kind of a mask, beside DTYPES


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels take such tensors, whose shapes fit each other."""
    return (
        q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] % 8 == 0
        and 0 < q.shape[-1] <= MOST_SIZE
        and q.shape[0] * q.shape[1] * q.shape[2] < MOST_ROWS
        and k.shape[2] <= MOST_POSITIONS
        and (mask is None or mask.dtype == torch.bool or mask.dtype in DTYPES)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The op `moepress::attention`. What the kernels do not take goes to the reference.

    Keys and values are read where they are, if numbers of a position follow each other and begin
    at multiples of 16 bytes; else they are copied.
    """
    batches, query_heads, tokens, size = q.shape
    heads, positions = k.shape[1], k.shape[2]
    if not takes(q, k, v, mask):
        return reference.attention(q, k, v, mask, scale)
    y = q.new_empty(batches, tokens, query_heads, size)
    if not y.numel():
        return y
    if not positions:
        return y.zero_()
    launcher = launcher_for(q.device)
    group = query_heads // heads
    kernel = kernel_of(q.dtype, size, group * tokens)
    blocks = -(-group * tokens // kernel.rows)
    most = kernel.resident * launcher.multiprocessors
    splits = splits_of(batches * heads * blocks, positions, most)
    queries = batches * query_heads * tokens
    parts = q.new_empty(queries * splits * (size + 2), dtype=torch.float32)
    values, sums = parts.split_with_sizes((queries * splits * size, queries * splits * 2))
    q, k, v = (_readable(x) for x in (q, k, v))
    shape: tuple[Argument, ...] = group, tokens, positions, size
    launcher.launch(
        kernel.name,
        (heads, splits, batches * blocks),
        THREADS,
        kernel.shared,
        (
            *strided(q),
            *strided(k),
            *strided(v),
            *_mask(mask, (batches, query_heads, tokens, positions)),
            *shape,
            float(scale),
            values,
            sums,
        ),
    )
    launcher.launch(
        "moepress_attention_merge",
        (queries, 1, 1),
        -(-size // 32) * 32,
        0,
        (values, sums, splits, heads, group, tokens, size, y, DTYPES[y.dtype]),
    )
    return y


@dataclass(frozen=True)
class Kernel:
    """A kernel for one split of the positions."""

    name: str
    rows: int  # of a block: queries that share keys
    width: int  # numbers of a head that it has place for
    resident: int  # blocks that a multiprocessor holds, by their registers

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: the sums of its four warps."""
        return 16 * self.rows * (self.width + 6)


def kernel_of(dtype: torch.dtype, size: int, rows: int) -> Kernel:
    if dtype == torch.float32:
        return Kernel("moepress_attention_plain", 4, 256, 2)
    width = -(-size // 64) * 64
    halves = 2 if rows > 8 and width <= 128 else 1
    name = f"moepress_attention_{NAMES[dtype]}_g{width}_p{halves}"
    return Kernel(name, 8 * halves, width, 3 if width * halves <= 128 else 2)


def splits_of(blocks: int, positions: int, most_blocks: int) -> int:
    """Into how many parts positions are cut, so that a card has about `most_blocks` in all."""
    tiles = -(-positions // TILE)
    splits = max(1, min(tiles, MOST_SPLITS, most_blocks // blocks))
    return -(-tiles // -(-tiles // splits))


def _readable(x: Tensor) -> Tensor:
    """x, or a copy that loads of 16 bytes can read."""
    numbers = 16 // x.element_size()
    strides = x.stride()
    if strides[3] == 1 and not any(s % numbers for s in strides[:3]) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Argument, ...]:
    if mask is None:
        return None, 0, 0, 0, 0, 0
    wide = mask.expand(shape)
    return wide, BOOL if mask.dtype == torch.bool else DTYPES[mask.dtype], *wide.stride()
