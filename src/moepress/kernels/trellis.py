"""The trellis code in plain PyTorch: values, paths, bytes, rotation. The definition of correct.

A trellis code (QTIP, arXiv:2406.11235) spends k bits on a weight and still chooses among 2**12
values. The values are indexed by a state of 12 bits. Its k newest bits, the branch, belong to the
weight; the older bits belong to the weights before it on the same path.

    state_t = (state_(t-1) * 2**k + branch_t) mod 2**12,   branch_t in 0 .. 2**k - 1
    value_t = (sum of the low bytes of  state_t * MULTIPLIERS[k]) - CENTERS[k]

Half widths have branches of two widths in turn (`branch_bits`) and values of whole widths
(`value_bits`). Since a state spans several branches, the error is that of the mean width
(docs/log.md#half-widths).

The multiplication scatters neighbouring states over the values. A sum of bytes, like any sum, is
nearly Gaussian, and so are rotated weights. At 1 and 2 bits the sum takes two bytes of the product;
at 3 and 4 bits, where the tails matter more, it takes all four. The search for the multipliers
and the error of other codes: docs/log.md#trellis-values; fewer and more states:
docs/log.md#trellis-states. rounding/methods/viterbi.py finds the best path.

Rotation. An orthogonal map Q cuts the columns into runs, whose length is 256, or the largest power
of two that divides K if that is less. It multiplies each run by fixed random signs, the same in
every run, and by a Hadamard matrix. The same map is applied to the inputs of a layer: W x =
(W Q^T)(Q x). The rows of W Q^T are nearly Gaussian, whatever the distribution of W. Shorter
runs raise the error (docs/log.md#rotation-runs). Longer ones leave the nearest memory, and the
columns of some runs are a matrix of their own (shards.py).

Paths. A path runs down the rows and takes every sixteenth row of four columns. Rounding therefore
finishes eight columns at a time, and later columns can compensate for the errors of earlier ones.
Tiles have 64 rows and 8 columns:

    16 lanes x 2 parities = 32 paths, of 16 weights in a tile; weight i of path (lane, parity) is
        row 16 * (i div 4) + lane,  column 2 * (i mod 4) + parity

A path continues in the tile below. The last tile continues in the first one (tail-biting), so no
start state is stored. The k bits of weight i follow those of weight i - 1 in k 16-bit words,
highest bit first. Word j of all 32 paths is one 512-bit register: [16 lanes][2 parities]. At a half
width a path has half a word more than a whole number of them in a tile. The half comes first, and
the halves of two neighbouring tiles share a word.

A register thus holds two neighbouring columns of 16 rows in 16 32-bit lanes. Shifting it gives the
states of the next step, and pairs of 16-bit values are operands of `vpmaddwd`: no value moves
between lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError
from moepress.format.codec import ROWS_PER_BLOCK, ROWS_PER_SLAB, Codec

# The values of a code: as they are (`values_in_turn`), or as kernels take them in products with
# activations of 8 bits, of few or of many tokens (`average_values`, `byte_values`).
Values = Literal["exact", "averages", "bytes"]
PackCodes = Callable[[Tensor, float], Tensor]  # as `pack_codes`

STATE_BITS = 12
STATES = 1 << STATE_BITS
MULTIPLIERS = {1: 47255, 2: 54641, 3: 44529, 4: 15601}
BYTES_SUMMED = {1: 2, 2: 2, 3: 4, 4: 4}  # how many bytes of the product, from the lowest
CENTERS = {1: 255, 2: 255, 3: 386, 4: 379}  # mean of the sum over all states, rounded
LONGEST_RUN = 256  # columns that a rotation mixes
TILE_COLUMNS = 8
STEPS = 16  # weights of a path in a tile
STRIP_WEIGHTS = 1 << 21  # weights decoded at a time: 8 MB in float32
WEIGHTS_AT_ONCE = 1 << 24  # packed, rotated, or brought from branches to values; bounds memory


def branch_bits(bits: float) -> tuple[int, int]:
    """The bits of branches of even and of odd steps: 1 and 2 at 1.5 bits, 2 and 2 at 2 bits."""
    return int(bits), math.ceil(bits)


def value_bits(bits: float) -> tuple[int, int]:
    """The whole widths whose values even and odd steps have.

    At 1.5 bits those of the branches. At 2.5 and 3.5 bits, where the tails matter more, those of 3
    and of 4 bits.
    """
    low, high = branch_bits(bits)
    return (low if high <= 2 else high), high


def values_in_turn(bits: float) -> Tensor:
    """The values of all states in even and in odd steps, [2, 4096] int32."""
    return torch.stack([code_values(each) for each in value_bits(bits)])


def deviation(bits: float) -> float:
    """The standard deviation of the values of a code."""
    return values_in_turn(bits).double().std(1, correction=0).square().mean().sqrt().item()


def code_values(bits: int) -> Tensor:
    """The value of every state at a whole width, [4096] int32."""
    return (torch.stack(_product_bytes(bits)).sum(0) - CENTERS[bits]).int()


def _product_bytes(bits: int) -> list[Tensor]:
    """The bytes of state * multiplier that a value sums, from the lowest: [4096] int64 each."""
    product = torch.arange(STATES, dtype=torch.int64, device="cpu") * MULTIPLIERS[bits]
    return [product >> 8 * i & 255 for i in range(BYTES_SUMMED[bits])]


def byte_values(bits: float) -> Tensor:
    """The values in even and in odd steps with one byte for each, [2, 4096] float32.

    CPU kernels that multiply bytes take these in place of `values_in_turn` in products of many
    tokens (kernels/cpu/trellis_bytes.h), so that one dot product takes 4 columns. At 2.5 and 3 bits
    the values are the same: the sum of the four bytes is a multiple of 3, since the multiplier is
    one, and 255 as well. At other widths they differ by up to 1; the mean difference is 0.
    """
    return torch.stack([_byte_values(each) for each in value_bits(bits)])


def average_values(bits: float) -> Tensor:
    """The values in even and in odd steps from averages of bytes, [2, 4096] float32.

    CPU kernels take these in place of `values_in_turn` in products of few tokens
    (kernels/cpu/trellis_product.h), so that one dot product takes the four bytes that a value above
    2 bits sums. They differ by up to 1, in the mean by less than .01. At 1 to 2 bits the values are
    the same.
    """
    return torch.stack([_average_values(each) for each in value_bits(bits)])


def _average_values(bits: int) -> Tensor:
    if BYTES_SUMMED[bits] == 2:
        return code_values(bits).float()
    first, second, third, fourth = _product_bytes(bits)
    total = ((first + third + 1) >> 1) + ((second + fourth + 1) >> 1)
    return (2 * total - (CENTERS[bits] + 1)).float()


def _byte_values(bits: int) -> Tensor:
    total = code_values(bits) + CENTERS[bits]
    if BYTES_SUMMED[bits] == 2:
        byte = (total + 1) >> 1
        return 2 * byte - (CENTERS[bits] + 0.5)
    byte = (10923 * total + (1 << 14)) >> 15  # a third, rounded
    return (3 * byte - CENTERS[bits]).float()


@lru_cache(maxsize=32)
def _table(bits: float, device: torch.device, values: Values) -> Tensor:
    tables = {"exact": values_in_turn, "averages": average_values, "bytes": byte_values}
    return tables[values](bits).to(device, torch.float32)


def pack(
    branches: Tensor, scales: Tensor, codec: Codec, pack_with: PackCodes | None = None
) -> Tensor:
    """The bytes of a matrix of trellis codes.

    Args:
        branches: [64 S, K] uint8, each below 2**bits of its step; S = N / 64, rounded up.
        scales: [N] bfloat16.
        pack_with: does what `pack_codes` does; None: that.

    Returns:
        [codec.nbytes(N, K)] uint8, on the device of `branches`.

    Raises:
        InputError: a shape or dtype differs, or a branch is too large.
    """
    if scales.dtype != torch.bfloat16 or scales.dim() != 1:
        raise InputError(f"scales must be [N] bfloat16, got {list(scales.shape)} {scales.dtype}.")
    rows = len(scales) + -len(scales) % ROWS_PER_SLAB
    if branches.dtype != torch.uint8 or branches.dim() != 2 or len(branches) != rows:
        raise InputError(
            f"branches must be [{rows}, K] uint8, got {list(branches.shape)} {branches.dtype}."
        )
    codec.groups(branches.shape[1])  # raises InputError if the group size does not divide K
    by_step = branches.view(rows, -1, 2, 2)  # neighbouring steps have neighbouring column pairs
    for step, width in enumerate(branch_bits(codec.bits)):
        if branches.numel() and (largest := int(by_step[:, :, step].max())) >= 1 << width:
            raise InputError(f"{codec.name} has branches 0 to {(1 << width) - 1}, got {largest}.")
    codes = (pack_with or pack_codes)(branches, codec.bits)
    return torch.cat([codes, F.pad(scales, (0, rows - len(scales))).view(torch.uint8)])


def pack_codes(branches: Tensor, bits: float) -> Tensor:
    """The bytes of whole slabs of branches [64 S, K]: [S * 64 * K * bits / 8] uint8."""
    step = max(1, WEIGHTS_AT_ONCE // (ROWS_PER_SLAB * branches.shape[1])) * ROWS_PER_SLAB
    some = [_pack(branches[i : i + step], bits) for i in range(0, len(branches), step)]
    return torch.cat([branches.new_empty(0), *some])


def _pack(branches: Tensor, bits: float) -> Tensor:
    """The bytes of whole slabs."""
    paths = to_paths(branches).int()  # [slabs, tiles, 16, 2, STEPS]
    octets = _octets(paths[..., ::2] << branch_bits(bits)[1] | paths[..., 1::2], round(2 * bits))
    slabs, tiles = octets.shape[:2]
    whole = int(bits)  # words of a tile, without a half
    words = octets[..., -2 * whole :].reshape(slabs, tiles, ROWS_PER_BLOCK, 2, whole, 2)
    words = words.flip(-1).permute(0, 1, 4, 2, 3, 5)  # low byte first: [..., words, 16, 2, 2]
    if bits == whole:
        return words.reshape(-1)
    halves = octets[..., 0].view(slabs, tiles // 2, 2, ROWS_PER_BLOCK, 2)
    shared = halves.flip(2).permute(0, 1, 3, 4, 2)[:, :, None]  # low byte: of the odd tile
    of_two = words.reshape(slabs, tiles // 2, 2 * whole, ROWS_PER_BLOCK, 2, 2)
    return torch.cat([shared, of_two], 2).reshape(-1)


def _octets(pairs: Tensor, width: int) -> Tensor:
    """Bits one after another as bytes: [..., 8] int32 of `width` bits to [..., width] uint8."""
    positions = torch.arange(width - 1, -1, -1, device=pairs.device)
    ones = torch.unflatten((pairs[..., None] >> positions & 1).flatten(-2), -1, (width, 8))
    powers = 1 << torch.arange(7, -1, -1, device=pairs.device, dtype=torch.int32)
    return (ones * powers).sum(-1).to(torch.uint8)  # highest first


def _from_octets(octets: Tensor, width: int) -> Tensor:
    """The inverse of `_octets`: [..., width] uint8 to [..., 8] int32."""
    positions = torch.arange(7, -1, -1, device=octets.device)
    ones = torch.unflatten((octets[..., None] >> positions & 1).flatten(-2), -1, (8, width)).int()
    powers = 1 << torch.arange(width - 1, -1, -1, device=octets.device, dtype=torch.int32)
    return (ones * powers).sum(-1).int()


def unpack(packed: Tensor, rows: int, cols: int, codec: Codec) -> tuple[Tensor, Tensor]:
    """The arguments of `pack`: branches [64 S, K] uint8 and scales [N] bfloat16.

    Args:
        packed: [codec.nbytes(rows, cols)] uint8.
        rows, cols: N, K.

    Raises:
        InputError: the number of bytes is not that of such a matrix.
    """
    codes, scales = split(packed, rows, cols, codec)
    return _branches(codes, cols, codec), scales[:rows]


def to_paths(matrix: Tensor) -> Tensor:
    """[64 S, K] to [S, K / 8 tiles, 16 lanes, 2 parities, 16 steps]."""
    shape = (-1, STEPS // 4, ROWS_PER_BLOCK, matrix.shape[1] // TILE_COLUMNS, 4, 2)
    return matrix.view(shape).permute(0, 3, 2, 5, 1, 4).flatten(-2)


def from_paths(paths: Tensor) -> Tensor:
    """The inverse of `to_paths`."""
    slabs, tiles = paths.shape[:2]
    by_step = torch.unflatten(paths, -1, (STEPS // 4, 4)).permute(0, 4, 2, 1, 5, 3)
    return by_step.reshape(slabs * ROWS_PER_SLAB, tiles * TILE_COLUMNS)


def states(branches: Tensor, bits: float) -> Tensor:
    """The states of whole paths, [..., T] int32, from their branches [..., T].

    Paths are tail-biting: the last branches precede the first.
    """
    widths = branch_bits(bits)
    ages = range(-(-STATE_BITS // widths[0]))
    # How many bits of its own and of steps after it stand below a branch: by the state's step.
    below = [[sum(widths[(step - n) % 2] for n in range(age)) for step in (0, 1)] for age in ages]
    places = torch.tensor(below, dtype=torch.int32, device=branches.device)
    places = places.clamp(max=STATE_BITS).repeat(1, branches.shape[-1] // 2)
    shifted = (branches.int().roll(age, dims=-1) << places[age] for age in ages)
    return reduce(torch.bitwise_or, shifted) & (STATES - 1)


def code_matrix(branches: Tensor, bits: float, values: Values = "exact") -> Tensor:
    """The values that branches [64 S, K] choose: [64 S, K] float32."""
    rows, cols = branches.shape
    step = max(1, WEIGHTS_AT_ONCE // (TILE_COLUMNS * rows)) * TILE_COLUMNS
    if cols <= step:
        return _code_matrix(branches, bits, values)
    matrix = torch.empty(rows, cols, device=branches.device)
    for first in range(0, cols, step):
        some = branches[:, first : first + step].contiguous()
        matrix[:, first : first + step] = _code_matrix(some, bits, values)
    return matrix


def _code_matrix(branches: Tensor, bits: float, values: Values) -> Tensor:
    paths = to_paths(branches)
    runs = paths.permute(1, 2, 3, 0, 4)  # [tiles, 16, 2, slabs, STEPS]
    reached = torch.unflatten(states(runs.flatten(-2), bits), -1, (-1, 2))
    table = _table(bits, branches.device, values)
    chosen = torch.stack([table[step][reached[..., step]] for step in (0, 1)], -1)
    return from_paths(chosen.view(runs.shape).permute(3, 0, 1, 2, 4))


def strips(
    packed: Tensor, rows: int, cols: int, codec: Codec, values: Values = "exact"
) -> Iterator[tuple[int, Tensor]]:
    """Rotated weights W Q^T of a packed matrix, some rows at a time: (first row, [n, K] float32).

    Each weight is scale * value, one float32 product.
    """
    codes, scales = split(packed, rows, cols, codec)
    step = max(1, STRIP_WEIGHTS // (ROWS_PER_SLAB * cols))
    for first in range(0, len(codes), step):
        # A path has 16 branches in a slab, 16 bits or more. A state spans 12 bits, so it reaches
        # into the slab above and no further.
        slabs = torch.cat(
            [codes[first - 1, None] if first else codes[-1:], codes[first : first + step]]
        )
        start = first * ROWS_PER_SLAB
        branches = _branches(slabs, cols, codec)
        some = code_matrix(branches, codec.bits, values)[ROWS_PER_SLAB:]
        some = some[: rows - start]
        yield start, some * scales[start : start + len(some), None].float()


def rotate(x: Tensor) -> Tensor:
    """Rotate inputs: Q x (Q: head of this file), so that W x = (W Q^T)(Q x).

    Computed in float32 or wider.

    Args:
        x: [..., K]; the result has its shape and dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return hadamard(wide * signs(x.shape[-1]).to(wide)).to(x.dtype)


def rotate_back(weight: Tensor) -> Tensor:
    """W from W Q^T, both [..., K]."""
    return hadamard(weight) * signs(weight.shape[-1]).to(weight)


def hadamard(x: Tensor) -> Tensor:
    """Multiply runs of columns by the orthonormal Hadamard matrix: [..., K] to [..., K].

    A run has n = `run_length(K)` columns. The matrix is Sylvester's, H_2n = [[H_n, H_n],
    [H_n, -H_n]], over sqrt(n); it is its own inverse. It takes log2(n) steps of sums and
    differences.
    """
    if x.numel() > WEIGHTS_AT_ONCE and x.dim() > 1 and len(x) > 1:
        out = torch.empty_like(x)
        step = max(1, WEIGHTS_AT_ONCE // (x.numel() // len(x)))
        for first in range(0, len(x), step):
            out[first : first + step] = _hadamard(x[first : first + step])
        return out
    return _hadamard(x)


def _hadamard(x: Tensor) -> Tensor:
    size = run_length(x.shape[-1])
    y = x
    half = 1
    while half < size:
        pairs = torch.unflatten(y, -1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    normal: float = size**-0.5
    return y * normal


def run_length(cols: int) -> int:
    """The largest power of two up to LONGEST_RUN that divides `cols`."""
    return min(cols & -cols, LONGEST_RUN)


@lru_cache(maxsize=32)
def signs(cols: int) -> Tensor:
    """+1 or -1 for each column, [K] float32: the lowest bit of a hash of its place in its run."""
    h = torch.arange(cols, dtype=torch.int64, device="cpu") % run_length(cols)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    h = h ^ h >> 16
    return (1 - 2 * (h & 1)).float()


def split(packed: Tensor, rows: int, cols: int, codec: Codec) -> tuple[Tensor, Tensor]:
    """Codes [slabs, slab bytes] uint8 and scales [64 slabs] bfloat16, views of the packed bytes."""
    expected = codec.nbytes(rows, cols)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise InputError(
            f"A packed [{rows}, {cols}] matrix of {codec.name} is [{expected}] uint8, got "
            f"{list(packed.shape)} {packed.dtype}."
        )
    slabs, size = -(-rows // ROWS_PER_SLAB), codec.slab_bytes(cols)
    codes, scales = packed.split_with_sizes([slabs * size, 2 * ROWS_PER_SLAB * slabs])
    return codes.view(slabs, size), scales.clone().view(torch.bfloat16)


def _branches(codes: Tensor, cols: int, codec: Codec) -> Tensor:
    """Bytes of slabs [S, slab bytes] to branches [64 S, K] uint8."""
    whole, tiles = int(codec.bits), cols // TILE_COLUMNS
    words = codes.view(len(codes), -1, ROWS_PER_BLOCK, 2, 2)
    if codec.bits == whole:
        octets = _tile_octets(words, tiles)
    else:
        of_two = words.view(len(codes), tiles // 2, 1 + 2 * whole, ROWS_PER_BLOCK, 2, 2)
        halves = of_two[:, :, 0].permute(0, 1, 4, 2, 3).flip(2)  # of the even, of the odd tile
        halves = halves.reshape(len(codes), tiles, ROWS_PER_BLOCK, 2, 1)
        octets = torch.cat([halves, _tile_octets(of_two[:, :, 1:], tiles)], -1)
    pairs = _from_octets(octets, round(2 * codec.bits))
    high = branch_bits(codec.bits)[1]
    steps = torch.stack([pairs >> high, pairs & (1 << high) - 1], -1).flatten(-2)
    return from_paths(steps.to(torch.uint8))


def _tile_octets(words: Tensor, tiles: int) -> Tensor:
    """Words [S, ..., 16, 2, 2 bytes] to [S, tiles, 16, 2, bytes of a path in a tile]."""
    by_tile = words.reshape(len(words), tiles, -1, ROWS_PER_BLOCK, 2, 2)
    return by_tile.flip(-1).permute(0, 1, 3, 4, 2, 5).flatten(-2)
