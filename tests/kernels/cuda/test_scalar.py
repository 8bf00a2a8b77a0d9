"""Products with scalar codes, and the embedding, on the emulator, against kernels/reference.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moepress.format.codec import GRID_BITS, GROUP_SIZES, Codec
from moepress.kernels import reference, scalar
from moepress.kernels.reference import ACTIVATION_RANGE
from tests.kernels.cuda.emulate import EmulationError, launch, needs_compiler

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

KERNELS = {  # name: (rows of a block, threads, positions of a panel, stages)
    "moepress_scalar_decode": (128, 128, 8),
}


def shared_bytes(kernel: str, group: int, planes: int) -> int:
    return 2 * (8704 * planes + 65536 // group)


def random_matrix(rows: int, cols: int, codec: Codec) -> tuple[Tensor, Tensor]:
    """Packed bytes, and the weights in float64."""
    groups = cols // codec.group_size
    codes = torch.randint(0, codec.levels + 1, (rows, cols), dtype=torch.uint8)
    scales = (torch.randn(rows, groups) * 0.1).bfloat16()
    zeros = torch.randint(0, 256, (rows, groups), dtype=torch.uint8) if codec.has_zero else None
    packed = scalar.pack(codes, scales, zeros, codec)
    return packed, reference.dequantize(packed, rows, cols, codec).double()


def random_activations(rows: int, cols: int, group: int, planes: int) -> tuple[Tensor, ...]:
    """q, scale and sum as the kernels take them, and the activations in float64."""
    largest = int(ACTIVATION_RANGE[8 * planes])
    codes = torch.randint(-largest, largest + 1, (rows, cols), dtype=torch.int32)
    high = (codes + 64 >> 7) if planes == 2 else codes
    q = torch.stack([high, codes - 128 * high] if planes == 2 else [high]).to(torch.int8)
    scale = torch.rand(rows, cols // group) + 0.5
    sums = codes.unflatten(1, (-1, group)).sum(2, dtype=torch.int32)
    x = scale.double()[:, :, None] * codes.unflatten(1, (-1, group)).double()
    return q, scale, sums, x.flatten(1)


def close(got: Tensor, exact: Tensor, size: Tensor) -> None:
    """`size` [...]: the sum of the terms' absolute values."""
    assert got.isfinite().all()
    assert ((got.double() - exact).abs() <= 1e-6 * size).all(), (
        (got.double() - exact).abs() / size
    ).max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits, group", itertools.product(GRID_BITS, GROUP_SIZES))
def test_one_matrix(kernel: str, bits: int, group: int, planes: int) -> None:
    torch.manual_seed(0)
    row_block, threads, size = KERNELS[kernel]
    for tokens, rows, groups, splits in ((1, 37, 1, 1), (3, 130, 3, 2), (size + 5, 16, 13, 3)):
        codec, cols = Codec(bits, group), groups * group
        packed, weights = random_matrix(rows, cols, codec)
        q, scale, sums, x = random_activations(tokens, cols, group, planes)
        out = torch.full((splits, tokens, rows), torch.nan)
        launch(
            f"{kernel}_g{group}_p{planes}",
            (-(-rows // row_block), splits, -(-tokens // size)),
            threads,
            shared_bytes(kernel, group, planes),
            [q, scale, sums, planes, tokens, None, 1, None, tokens, packed, packed.numel(), None,
             bits, rows, cols, group, out, splits],
        )  # fmt: skip
        per = -(-groups // splits) * group
        for part, s in zip(out, range(0, cols, per), strict=True):
            at = slice(s, s + per)
            exact = x[:, at] @ weights[:, at].T
            close(part, exact, x[:, at].abs() @ weights[:, at].abs().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits, group", itertools.product(GRID_BITS, GROUP_SIZES))
def test_embedding(bits: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codec, rows, cols = Codec(bits, group), 37, 5 * group
    packed, _ = random_matrix(rows, cols, codec)
    ids = torch.cat([torch.randint(0, rows, (9,)), torch.tensor([0, 36])])
    out = torch.empty(len(ids), cols, dtype=dtype)
    args = [packed, rows, cols, bits, group, out, DTYPES.index(dtype)]
    launch("moepress_embedding", (len(ids), 1, 1), 128, 0, [ids, len(ids), *args])
    assert out.equal(reference.embedding(ids, packed, rows, cols, codec, dtype))
    for bad in (-1, rows, 2**62):
        ids[3] = bad
        with pytest.raises(EmulationError, match="outside the table"):
            launch("moepress_embedding", (len(ids), 1, 1), 128, 0, [ids, len(ids), *args])
