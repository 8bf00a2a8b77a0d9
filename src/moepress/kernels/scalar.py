"""Bytes of scalar codes in plain PyTorch: pack, unpack, and the weights that codes stand for.

A packed matrix [N, K] is a run of blocks of 16 rows (docs/format.md specifies every byte):

    block   | codes: G tiles, one per group | scales [G, 16] bfloat16 | zeros [G, 16] uint8 |
    tile    one plane; at 3 bits a plane of the low two bits, then one of the high bit
    plane   of b bits, p = 8 / b codes a byte: chunks of 4p columns, byte [chunk][row][j]
            holds columns 4p * chunk + 4i + j, i in 0 .. p-1, at bit b * i

    2 bits, columns of byte [chunk 0][row r][j]:     bit 7 6   5 4   3 2   1 0
                                                     col 12+j  8+j   4+j    j

Shift a 64-byte chunk right by b * i and mask it: each of the 16 int32 lanes of a register then
holds four neighbouring columns of its own row. That is the operand of the u8 x s8 dot product, with
activations broadcast and no shuffle. In PyTorch it is a shift, a mask and a permutation of axes.

Comments give shapes in B blocks, G groups, g columns per group, C chunks, n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError
from moepress.format.codec import ROWS_PER_BLOCK, Codec

STRIP_WEIGHTS = 1 << 22  # weights packed or unpacked at a time: 16 MB in float32


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> Tensor:
    """The bytes of a quantized matrix.

    Args:
        codes: [N, K] uint8, each at most `codec.levels`.
        scales: [N, G] bfloat16.
        zeros: [N, G] uint8, or None where the codec stores none.
        codec: bits and group size; G = K / group size.

    Returns:
        [codec.nbytes(N, K)] uint8, on the device of `codes`.

    Raises:
        InputError: a shape or dtype differs, a code is too large, or zeros do not fit the codec.
    """
    _check_fields(codes, scales, zeros, codec)
    rows, cols = codes.shape
    packed = torch.zeros(codec.nbytes(rows, cols), dtype=torch.uint8, device=codes.device)
    blocks = _blocks(packed, rows, cols, codec)
    step = _blocks_at_once(cols)
    for first in range(0, len(blocks), step):
        some = slice(first * ROWS_PER_BLOCK, (first + step) * ROWS_PER_BLOCK)
        of_zeros = None if zeros is None else zeros[some]
        blocks[first : first + step] = _pack_rows(codes[some], scales[some], of_zeros, codec)
    return packed


def unpack(
    packed: Tensor, rows: int, cols: int, codec: Codec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of `pack`: codes [N, K] uint8, scales [N, G] bfloat16, zeros [N, G] or None.

    Args:
        packed: [codec.nbytes(rows, cols)] uint8.
        rows, cols: N, K.

    Raises:
        InputError: the codec is not scalar, or the number of bytes is not that of such a matrix.
    """
    codes, scales, zeros = _unpack_rows(_blocks(packed, rows, cols, codec), cols, codec)
    return codes[:rows], scales[:rows], None if zeros is None else zeros[:rows]


def strips(packed: Tensor, rows: int, cols: int, codec: Codec) -> Iterator[tuple[int, Tensor]]:
    """The weights of a packed matrix, some rows at a time: (first row, [n, K] float32).

    Memory beside the result stays near `STRIP_WEIGHTS` floats.
    """
    blocks = _blocks(packed, rows, cols, codec)
    step = _blocks_at_once(cols)
    for first in range(0, len(blocks), step):
        start = first * ROWS_PER_BLOCK
        fields = _unpack_rows(blocks[first : first + step], cols, codec)
        yield start, _weights(*fields, codec)[: rows - start]


def some_rows(packed: Tensor, rows: int, cols: int, codec: Codec, wanted: Tensor) -> Tensor:
    """The weights of the rows `wanted` ([n] int64), in that order: [n, K] float32."""
    fields = _unpack_rows(_blocks(packed, rows, cols, codec), cols, codec, wanted)
    return _weights(*fields, codec)


def _blocks_at_once(cols: int) -> int:
    """How many blocks of K columns are packed or unpacked at a time."""
    return max(1, STRIP_WEIGHTS // (ROWS_PER_BLOCK * cols))


def _planes(codec: Codec) -> tuple[tuple[int, int], ...]:
    """(bits, shift within the code) of the bit planes of a tile, in order."""
    return ((2, 0), (1, 2)) if codec.bits == 3 else ((codec.number, 0),)


def _pack_rows(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> Tensor:
    """The blocks [B, block bytes] of some rows of a matrix; the arguments are those of `pack`."""
    padding = (0, 0, 0, -len(codes) % ROWS_PER_BLOCK)
    shape = -1, ROWS_PER_BLOCK, codec.groups(codes.shape[1]), codec.group_size
    tiles = F.pad(codes, padding).view(shape)  # [B, 16, G, g]
    fields = [
        torch.cat([_pack_plane(tiles >> shift, bits) for bits, shift in _planes(codec)], dim=2),
        _pack_side(F.pad(scales, padding)),
        *([] if zeros is None else [_pack_side(F.pad(zeros, padding))]),
    ]
    return torch.cat([field.flatten(1) for field in fields], dim=1)


def _pack_plane(tiles: Tensor, bits: int) -> Tensor:
    """The low `bits` bits of codes [B, 16, G, g] as bytes [B, G, 16 * g * bits / 8]."""
    per_byte = 8 // bits
    columns = torch.unflatten(tiles & ((1 << bits) - 1), 3, (-1, per_byte, 4))  # [B,16,G,C,i,4]
    plane = reduce(torch.bitwise_or, (columns[..., i, :] << (bits * i) for i in range(per_byte)))
    return plane.permute(0, 2, 3, 1, 4).flatten(2)  # [B, G, C * 16 * 4]


def _pack_side(values: Tensor) -> Tensor:
    """Scales or zeros [16 B, G] as bytes [B, G, 16 * itemsize]."""
    blocks = values.view(-1, ROWS_PER_BLOCK, values.shape[1]).transpose(1, 2)
    return blocks.contiguous().view(torch.uint8)


def _blocks(packed: Tensor, rows: int, cols: int, codec: Codec) -> Tensor:
    """A view of a packed matrix, [blocks, block bytes] uint8."""
    _check_scalar(codec)
    expected = codec.nbytes(rows, cols)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise InputError(
            f"A packed [{rows}, {cols}] matrix of {codec.name} is [{expected}] uint8, got "
            f"{list(packed.shape)} {packed.dtype}."
        )
    blocks, size = -(-rows // ROWS_PER_BLOCK), codec.block_bytes(cols)
    return packed[: blocks * size].view(blocks, size)


def _unpack_rows(
    blocks: Tensor, cols: int, codec: Codec, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [n, K], scales [n, G] and zeros [n, G] or None, of `rows` ([n] int64) or of all."""
    groups = codec.groups(cols)
    tile = ROWS_PER_BLOCK * codec.group_size * codec.number // 8
    sizes = [groups * tile, 2 * groups * ROWS_PER_BLOCK, codec.has_zero * groups * ROWS_PER_BLOCK]
    tiles, scales, zeros = blocks.split_with_sizes(sizes, dim=1)
    return (
        _unpack_codes(torch.unflatten(tiles, 1, (groups, tile)), codec, rows),
        _unpack_side(scales, groups, rows).view(torch.bfloat16).squeeze(2),
        _unpack_side(zeros, groups, rows).squeeze(2) if codec.has_zero else None,
    )


def _unpack_codes(tiles: Tensor, codec: Codec, rows: Tensor | None) -> Tensor:
    """Tiles [B, G, tile bytes] to codes [n, K] uint8."""
    planes = _planes(codec)
    sizes = [ROWS_PER_BLOCK * codec.group_size * bits // 8 for bits, _ in planes]
    chunks = [
        torch.unflatten(t, 2, (-1, ROWS_PER_BLOCK, 4)) for t in tiles.split_with_sizes(sizes, dim=2)
    ]
    codes = (
        _unpack_plane(_take(chunk, rows), bits) << shift
        for chunk, (bits, shift) in zip(chunks, planes, strict=True)
    )
    return reduce(torch.bitwise_or, codes)


def _unpack_plane(chunks: Tensor, bits: int) -> Tensor:
    """Bytes [n, G, C, 4] of rows to codes [n, K]."""
    mask = (1 << bits) - 1
    shifted = [chunks >> (bits * i) & mask for i in range(8 // bits)]
    return torch.stack(shifted, dim=3).flatten(1)  # [n, G, C, i, 4]


def _unpack_side(values: Tensor, groups: int, rows: Tensor | None) -> Tensor:
    """Bytes of scales or zeros, [B, G * 16 * itemsize], to [n, G, itemsize] contiguous.

    A copy: packed bytes may begin at an odd address, where nothing can be viewed as bfloat16.
    """
    side = _take(torch.unflatten(values, 1, (groups, ROWS_PER_BLOCK, -1)), rows)
    return side.clone(memory_format=torch.contiguous_format)


def _take(fields: Tensor, rows: Tensor | None) -> Tensor:
    """[B, ..., 16, x] to [n, ..., x]: the given rows, or all of them in order."""
    by_row = fields.movedim(-2, 1)
    if rows is None:
        return by_row.flatten(0, 1)
    return by_row[rows // ROWS_PER_BLOCK, rows % ROWS_PER_BLOCK]


def _weights(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> Tensor:
    """codes [n, K], scales [n, G], zeros [n, G] or None to weights [n, K] float32."""
    weights = torch.unflatten(codes, 1, (-1, codec.group_size)).float()
    if zeros is None:
        weights -= codec.levels / 2
    else:
        # Divide by a tensor: CUDA replaces division by a Python number with multiplication by its
        # reciprocal, which rounds differently.
        zero = zeros.float() * codec.levels / zeros.new_full((), 255.0, dtype=torch.float32)
        weights -= zero[..., None]
    weights *= scales.float()[..., None]
    return weights.flatten(1)


def _check_scalar(codec: Codec) -> None:
    if codec.family != "int":
        raise InputError(
            f"{codec.name} is no scalar code. Expected the family 'int'; kernels/trellis.py packs "
            "and unpacks trellis codes."
        )


def _check_fields(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> None:
    _check_scalar(codec)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise InputError(f"codes must be [N, K] uint8, got {list(codes.shape)} {codes.dtype}.")
    side = (codes.shape[0], codec.groups(codes.shape[1]))
    if scales.dtype != torch.bfloat16 or scales.shape != side:
        raise InputError(
            f"scales must be {list(side)} bfloat16, got {list(scales.shape)} {scales.dtype}."
        )
    if (zeros is not None) != codec.has_zero:
        raise InputError(
            f"{codec.name} stores {'one zero per group' if codec.has_zero else 'no zeros'}, got "
            f"{'none' if zeros is None else list(zeros.shape)}."
        )
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != side):
        raise InputError(
            f"zeros must be {list(side)} uint8, got {list(zeros.shape)} {zeros.dtype}."
        )
    if codes.numel() and int(codes.max()) > codec.levels:
        raise InputError(f"{codec.name} has codes 0 to {codec.levels}, got {int(codes.max())}.")
