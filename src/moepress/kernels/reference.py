"""Packed bytes in plain PyTorch: the definition of correct, which other kernels are tested against.

A packed matrix [N, K] is a run of blocks of 16 rows (docs/format.md has every byte):

    block   | codes: G tiles, one per group | scales [G, 16] bfloat16 | zeros [G, 16] uint8 |
    tile    one plane; at 3 bits a plane of the low two bits, then one of the high bit
    plane   of b bits, p = 8 / b codes a byte: chunks of 4p columns, byte [chunk][row][j]
            holds columns 4p * chunk + 4i + j, i in 0 .. p-1, at bit b * i

    2 bits, columns of byte [chunk 0][row r][j]:     bit 7 6   5 4   3 2   1 0
                                                     col 12+j  8+j   4+j    j

Shift a 64-byte chunk right by b * i, mask it, and each of the 16 int32 lanes of a register holds
four neighbouring columns of its own row: the operand of the u8 x s8 dot product, activations
broadcast, with no shuffle. In PyTorch the same fact is a shift, a mask and a permutation of axes.

Everything works on strips of rows, so memory beside the result stays near `STRIP_WEIGHTS` floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError
from moepress.format.codec import LEFT_OUT, ROWS_PER_BLOCK, Codec
from moepress.kernels import trellis

ACTIVATION_RANGE = {8: 127.0, 16: 128.0 * 127.0}  # bits to the largest code
STRIP_WEIGHTS = 1 << 22  # weights unpacked at a time: 16 MB in float32

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # by their names in transformers' ACT2FN
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


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
        InputError: a shape or dtype differs, a code is too large, zeros do not fit the codec.
    """
    _check_parts(codes, scales, zeros, codec)
    rows, cols = codes.shape
    groups = codec.groups(cols)
    padding = (0, 0, 0, -rows % ROWS_PER_BLOCK)
    tiles = F.pad(codes, padding).view(-1, ROWS_PER_BLOCK, groups, codec.group_size)  # [B,16,G,g]
    parts = [
        torch.cat([_pack_plane(tiles >> shift, bits) for bits, shift in _planes(codec)], dim=2),
        _pack_side(F.pad(scales, padding)),
        *([] if zeros is None else [_pack_side(F.pad(zeros, padding))]),
    ]
    blocks = torch.cat([part.flatten(1) for part in parts], dim=1)  # [B, block bytes]
    return F.pad(blocks.flatten(), (0, codec.nbytes(rows, cols) - blocks.numel()))


def unpack(
    packed: Tensor, rows: int, cols: int, codec: Codec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The parts that `pack` was given: codes [N, K] uint8, scales [N, G] bfloat16, zeros or None.

    Args:
        packed: [codec.nbytes(rows, cols)] uint8.

    Raises:
        InputError: the number of bytes is not that of such a matrix.
    """
    codes, scales, zeros = _unpack_rows(_blocks(packed, rows, cols, codec), cols, codec)
    return codes[:rows], scales[:rows], None if zeros is None else zeros[:rows]


def dequantize(
    packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [N, K] that a packed matrix stands for.

    w = scale * (code - zero), zero = zero_code * levels / 255 (symmetric codecs: levels / 2), each
    operation rounded to float32, then cast to `dtype`. Of a trellis: kernels/trellis.py.
    """
    out = packed.new_empty((rows, cols), dtype=dtype)
    for start, weights in _strips(packed, rows, cols, codec):
        if codec.family == "trellis":
            weights = trellis.rotate_back(weights)
        out[start : start + len(weights)] = weights
    return out


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    codec: Codec,
    activation_bits: int = 16,
    *,
    rounded: bool = False,
) -> Tensor:
    """x W^T + bias with W packed: x [..., K] to [..., N], in the dtype of x.

    Activations keep their dtype, which is at least what `activation_bits` asks for. With `rounded`
    they are rounded to that many bits first: the oracle of kernels that multiply integers. Those of
    trellis codes take rotated inputs, of 16 bits always.
    """
    if codec.family == "trellis":
        x, activation_bits = trellis.rotate(x), 16
    if rounded:
        x = round_activations(x, codec.group_size, activation_bits)
    out = x.new_empty((*x.shape[:-1], out_features))
    for start, weights in _strips(packed, out_features, x.shape[-1], codec):
        rows = slice(start, start + len(weights))
        out[..., rows] = F.linear(x, weights.to(x.dtype), None if bias is None else bias[rows])
    return out


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_table: Tensor,
    down_table: Tensor,
    intermediate_size: int,
    gate_up_group: int,
    down_group: int,
    activation: str,
    activation_bits: int = 16,
    family: str = "int",
    *,
    rounded: bool = False,
) -> Tensor:
    """Routed experts: y_t = sum_k w_tk down_e(act(gate_e x_t) * up_e x_t), e = index_tk.

    Arguments as of the op `moepress::experts`, `activation_bits` and `rounded` as of `linear`.
    Experts come one after another; those without a token are not touched, those of 0 bits have no
    output. Products are in the dtype of `hidden`, the sum over k in float32.
    """
    width = hidden.shape[1]
    act = activation_function(activation)
    total = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    gate_up_rows, down_rows = gate_up_table.tolist(), down_table.tolist()  # [E][offset, bits]
    for expert, slots in _slots_by_expert(top_k_index, len(gate_up_rows)):
        if gate_up_rows[expert][1] == down_rows[expert][1] == LEFT_OUT:
            continue
        token = slots // top_k_index.shape[1]
        shapes = (2 * intermediate_size, width), (width, intermediate_size)
        up_bytes, up_codec = _matrix(
            gate_up, gate_up_rows[expert], gate_up_group, family, *shapes[0]
        )
        down_bytes, down_codec = _matrix(down, down_rows[expert], down_group, family, *shapes[1])
        gate, up = linear(
            hidden[token], up_bytes, None, shapes[0][0], up_codec, activation_bits, rounded=rounded
        ).chunk(2, dim=-1)
        y = linear(
            act(gate) * up, down_bytes, None, width, down_codec, activation_bits, rounded=rounded
        )
        weight = top_k_weights.flatten()[slots].to(total.dtype)
        total.index_add_(0, token, y.to(total.dtype) * weight[:, None])
    return total.to(hidden.dtype)


def round_activations(x: Tensor, group_size: int, bits: int) -> Tensor:
    """Activations as integer kernels see them: a * q, one scale a per group of columns.

    q = round(x * (R / m)), half to even, and a = m / R, each operation in float32; m is the largest
    |x| of the group and R = 127 at 8 bits, 128 * 127 at 16. Below m = 2**-100 a group is 0. An
    infinity or a NaN makes its whole group NaN.

    Args:
        x: [..., K], a float dtype.
        group_size: columns that share a scale; divides K.
        bits: 8 or 16.

    Returns:
        [..., K] in the dtype of x; a * q is one product in that dtype.
    """
    groups = torch.unflatten(x.float(), -1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)  # NaN where there is one
    span = torch.full_like(largest, ACTIVATION_RANGE[bits])
    counts = (largest >= 2.0**-100) & (largest < torch.inf)
    codes = torch.where(counts, groups * (span / largest), 0).round()
    scale = torch.where(counts, largest / span, 0).masked_fill(~largest.isfinite(), torch.nan)
    return (scale.to(x.dtype) * codes.to(x.dtype)).flatten(-2)


def embedding(
    ids: Tensor, packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` of a packed matrix: ids [...] to [..., cols]. Each row in use is unpacked once."""
    used, place = torch.unique(ids, return_inverse=True)
    if len(used) and not 0 <= int(used[0]) <= int(used[-1]) < rows:
        raise InputError(
            f"Embedding ids run from {int(used[0])} to {int(used[-1])}; expected 0 to {rows - 1}. "
            "The tokenizer does not belong to this model."
        )
    parts = _unpack_rows(_blocks(packed, rows, cols, codec), cols, codec, used)
    return _weights(*parts, codec).to(dtype)[place]


def drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take from each token the experts whose weight is small beside its largest.

    Arguments and results as of the op `moepress::drop`.
    """
    none = (index < 0) | (index >= num_experts)
    ranked, order = weights.masked_fill(none, 0).sort(dim=1, descending=True, stable=True)
    dropped = (ranked < thresholds * ranked[:, :1]) & ~none.gather(1, order)
    if keep is not None:
        dropped &= ~keep[:, None]
    kept = ranked.masked_fill(dropped, 0)
    if renormalise:
        left = kept.sum(1, keepdim=True)
        kept = torch.where(left > 0, kept * (ranked.sum(1, keepdim=True) / left), kept)
    return index.gather(1, order).masked_fill(dropped, num_experts), kept, dropped


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name.

    Raises:
        InputError: it is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise InputError(
            f"Activation '{name}' is not supported. Expected one of {sorted(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def check_activation_bits(bits: int) -> None:
    """Raise InputError for a precision of activations that is not offered."""
    if bits not in ACTIVATION_RANGE:
        raise InputError(f"activation_bits is {bits}. Expected one of {sorted(ACTIVATION_RANGE)}.")


def _planes(codec: Codec) -> tuple[tuple[int, int], ...]:
    """(bits, shift within the code) of the bit planes of a tile, in order."""
    return ((2, 0), (1, 2)) if codec.bits == 3 else ((codec.bits, 0),)


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
    """Codes [n, K], scales [n, G] and zeros [n, G] of `rows` [n] int64, or of all rows."""
    groups = codec.groups(cols)
    tile = ROWS_PER_BLOCK * codec.group_size * codec.bits // 8
    sizes = [groups * tile, 2 * groups * ROWS_PER_BLOCK, codec.has_zero * groups * ROWS_PER_BLOCK]
    tiles, scales, zeros = blocks.split_with_sizes(sizes, dim=1)
    return (
        _unpack_codes(torch.unflatten(tiles, 1, (groups, tile)), codec, rows),
        _side(scales, groups, rows).view(torch.bfloat16).squeeze(2),
        _side(zeros, groups, rows).squeeze(2) if codec.has_zero else None,
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


def _side(values: Tensor, groups: int, rows: Tensor | None) -> Tensor:
    """Bytes of scales or zeros, [B, G * 16 * itemsize], to [n, G, itemsize] contiguous."""
    return _take(torch.unflatten(values, 1, (groups, ROWS_PER_BLOCK, -1)), rows).contiguous()


def _take(fields: Tensor, rows: Tensor | None) -> Tensor:
    """[B, ..., 16, x] to [n, ..., x]: some rows, or all of them in order."""
    by_row = fields.movedim(-2, 1)
    if rows is None:
        return by_row.flatten(0, 1)
    return by_row[rows // ROWS_PER_BLOCK, rows % ROWS_PER_BLOCK]


def _weights(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> Tensor:
    """codes [n, K], scales [n, G], zeros [n, G] or None to weights [n, K] float32."""
    weights = torch.unflatten(codes, 1, (-1, codec.group_size)).float()
    if zeros is None:
        weights -= codec.levels / 2
    else:  # divided by a tensor: CUDA multiplies by the reciprocal of a number, another rounding
        zero = zeros.float() * codec.levels / zeros.new_full((), 255.0, dtype=torch.float32)
        weights -= zero[..., None]
    weights *= scales.float()[..., None]
    return weights.flatten(1)


def _strips(packed: Tensor, rows: int, cols: int, codec: Codec) -> Iterator[tuple[int, Tensor]]:
    """The weights of a packed matrix, a strip of rows at a time: (first row, [n, K] float32).

    Those of a trellis are rotated.
    """
    if codec.family == "trellis":
        yield from trellis.strips(packed, rows, cols, codec)
        return
    blocks = _blocks(packed, rows, cols, codec)
    step = max(1, STRIP_WEIGHTS // (ROWS_PER_BLOCK * cols))
    for first in range(0, len(blocks), step):
        start = first * ROWS_PER_BLOCK
        parts = _unpack_rows(blocks[first : first + step], cols, codec)
        yield start, _weights(*parts, codec)[: rows - start]


def _matrix(
    packed: Tensor, entry: list[int], group_size: int, family: str, rows: int, cols: int
) -> tuple[Tensor, Codec]:
    """The bytes and the codec of one expert's matrix; `entry` is its line of the table."""
    offset, bits = entry
    codec = Codec(bits, group_size, family)
    return packed[offset : offset + codec.nbytes(rows, cols)], codec


def _slots_by_expert(index: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, positions in the flattened [T, k] index that chose it), for each expert in use."""
    flat = index.flatten()
    slots = ((flat >= 0) & (flat < count)).nonzero().squeeze(1)  # others are skipped by contract
    slots = slots[flat[slots].argsort(stable=True)]
    used, hits = torch.unique_consecutive(flat[slots], return_counts=True)
    yield from zip(used.tolist(), slots.split_with_sizes(hits.tolist()), strict=True)


def _check_scalar(codec: Codec) -> None:
    if codec.family != "int":
        raise InputError(
            f"{codec.name} is no scalar code: kernels/trellis.py packs and unpacks it."
        )


def _check_parts(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> None:
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
