"""Packed matrices of random codes, made on the device.

Any bytes are valid codes. Scales are such that products of inputs near 1 are near 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moepress.format.codec import LEFT_OUT, ROWS_PER_SLAB, Codec, PackedSpec


def random_packed(spec: PackedSpec, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Bytes of a packed tensor of [rows, cols] matrices, on the device of `generator`."""
    packed = torch.empty(spec.nbytes(rows, cols), dtype=torch.uint8, device=generator.device)
    fill_packed(packed, spec, rows, cols, generator)
    return packed


def fill_packed(
    packed: Tensor, spec: PackedSpec, rows: int, cols: int, generator: torch.Generator
) -> None:
    """Overwrite the bytes of a packed tensor."""
    fill_bytes(packed, generator)
    for bits, (start, end) in zip(spec.bits, pairwise(spec.offsets(rows, cols)), strict=True):
        if bits != LEFT_OUT:
            codec = Codec(bits, spec.group_size, spec.family)
            _set_scales(packed[start:end], rows, cols, codec, generator)


def fill_bytes(packed: Tensor, generator: torch.Generator) -> None:
    """Random bytes, eight at a time where the length allows."""
    words = packed.view(torch.int64) if packed.numel() % 8 == 0 else packed
    if words.dtype == torch.uint8:
        words.random_(0, 256, generator=generator)
    else:
        words.random_(-(2**63), None, generator=generator)


def _set_scales(
    matrix: Tensor, rows: int, cols: int, codec: Codec, generator: torch.Generator
) -> None:
    """Scales that differ between rows (and groups) by up to a factor of two."""
    if codec.family == "trellis":
        slabs = -(-rows // ROWS_PER_SLAB)
        scales = _near(cols**-0.5 / 100, slabs * ROWS_PER_SLAB, generator)
        scales[rows:] = 0
        matrix[slabs * codec.slab_bytes(cols) :] = scales.view(torch.uint8)
        return
    block = codec.block_bytes(cols)
    blocks = matrix[: -(-rows // 16) * block].view(-1, block)
    first = 2 * cols * codec.bits
    count = 16 * codec.groups(cols)
    scales = _near(cols**-0.5 / codec.levels, len(blocks) * count, generator)
    blocks[:, first : first + 2 * count] = scales.view(torch.uint8).view(len(blocks), -1)


def _near(middle: float, count: int, generator: torch.Generator) -> Tensor:
    spread = torch.rand(count, generator=generator, device=generator.device)
    return (middle * (0.67 + 0.67 * spread)).bfloat16()
