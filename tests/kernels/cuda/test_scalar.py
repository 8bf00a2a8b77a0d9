"""Products with scalar codes, and the embedding, on the emulator, against kernels/reference.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moepress.format.codec import GRID_BITS, GROUP_SIZES, Codec
from moepress.kernels import reference, scalar
from moepress.kernels.cuda import products
from moepress.kernels.reference import ACTIVATION_RANGE
from tests.kernels.cuda.emulate import EmulationError, launch, needs_compiler

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

KERNELS = {p["int"].kernel: p["int"] for p in (products.FEW, products.MANY)}


def random_matrix(rows: int, cols: int, codec: Codec) -> tuple[Tensor, Tensor]:
    """Packed bytes, and the weights in float64."""
    groups = cols // codec.group_size
    codes = torch.randint(0, codec.levels + 1, (rows, cols), dtype=torch.uint8)
    scales = (torch.randn(rows, groups) * 0.1).bfloat16()
    zeros = torch.randint(0, 256, (rows, groups), dtype=torch.uint8) if codec.has_zero else None
    packed = scalar.pack(codes, scales, zeros, codec)
    return packed, reference.dequantize(packed, rows, cols, codec).double()


@dataclass(frozen=True)
class Codes:
    """Activations: q, scale and sum as the kernels take them, and their values in float64."""

    q: Tensor
    scale: Tensor
    sum: Tensor
    x: Tensor


def random_activations(rows: int, cols: int, group: int, planes: int) -> Codes:
    largest = int(ACTIVATION_RANGE[8 * planes])
    codes = torch.randint(-largest, largest + 1, (rows, cols), dtype=torch.int32)
    high = (codes + 64 >> 7) if planes == 2 else codes
    q = torch.stack([high, codes - 128 * high] if planes == 2 else [high]).to(torch.int8)
    scale = torch.rand(rows, cols // group) + 0.5
    sums = codes.unflatten(1, (-1, group)).sum(2, dtype=torch.int32)
    x = scale.double()[:, :, None] * codes.unflatten(1, (-1, group)).double()
    return Codes(q, scale, sums, x.flatten(1))


def multiply(
    kernel: str,
    codes: Codes,
    pair: Tensor | None,
    k: int,
    panel: Tensor | None,
    panels: int,
    packed: Tensor,
    table: Tensor | None,
    bits: int,
    group: int,
    out: Tensor,
) -> None:
    """Launch a product: out [splits, positions, N]."""
    splits, positions, rows = out.shape
    planes, inputs, cols = codes.q.shape
    how = KERNELS[kernel]
    launch(
        how.name(group, planes),
        (how.row_blocks(rows), splits, panels),
        how.threads,
        how.shared(cols, group, splits, planes),
        [codes.q, codes.scale, codes.sum, planes, inputs, pair, k, panel, positions, packed,
         packed.numel(), table, bits, rows, cols, group, out, splits],
    )  # fmt: skip


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
    size = KERNELS[kernel].panel(planes)
    for tokens, rows, groups, splits in (
        (1, 37, 1, 1), (3, 130, 3, 2), (size + 5, 16, 13, 3), (5, 20, 1300 // group, 1)
    ):  # fmt: skip
        codec, cols = Codec(bits, group), groups * group
        packed, weights = random_matrix(rows, cols, codec)
        codes = random_activations(tokens, cols, group, planes)
        out = torch.full((splits, tokens, rows), torch.nan)
        panels = -(-tokens // size)
        multiply(kernel, codes, None, 1, None, panels, packed, None, bits, group, out)
        x = codes.x
        per = -(-groups // splits) * group
        for part, s in zip(out, range(0, cols, per), strict=True):
            at = slice(s, s + per)
            exact = x[:, at] @ weights[:, at].T
            close(part, exact, x[:, at].abs() @ weights[:, at].abs().T)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("planes", [1, 2])
def test_experts_of_mixed_widths(kernel: str, planes: int) -> None:
    """Panels of several experts, one of them empty; rows of activations shared by positions."""
    torch.manual_seed(0)
    rows, group, k, tokens = 140, 64, 3, 11
    cols, widths = 3 * group, (1, 2, 3, 4, 8)
    matrices = [random_matrix(rows, cols, Codec(bits, group)) for bits in widths]
    packed = torch.cat([p for p, _ in matrices])
    sizes = [p.numel() for p, _ in matrices]
    table = torch.tensor([(sum(sizes[:e]), bits) for e, bits in enumerate(widths)])
    codes = random_activations(tokens, cols, group, planes)
    pair = torch.randperm(tokens * k, dtype=torch.int32)
    positions = len(pair)
    size = KERNELS[kernel].panel(planes)
    panel = [(3, 0, 1), (0, 1, min(size, 9)), (2, 10, 5), (0, 0, 0), (4, 15, 8), (1, 23, 4)]
    out = torch.full((2, positions, rows), torch.nan)
    multiply(
        kernel, codes, pair, k, torch.tensor(panel, dtype=torch.int32), len(panel), packed, table,
        0, group, out,
    )  # fmt: skip
    written = torch.zeros(positions, dtype=torch.bool)
    for expert, first, count in panel:
        if not count:
            continue
        at = slice(first, first + count)
        x, weights = codes.x[pair[at].long() // k], matrices[expert][1]
        close(out[:, at].double().sum(0), x @ weights.T, x.abs() @ weights.abs().T)
        written[at] = True
    assert out[:, ~written].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bad_tables_and_scales(kernel: str) -> None:
    packed, _ = random_matrix(32, 64, Codec(2, 32))
    codes = random_activations(2, 64, 32, 1)
    panel = torch.tensor([[0, 0, 2]], dtype=torch.int32)
    out = torch.empty(1, 2, 32)
    for entry in ((0, 5), (64, 2), (-64, 2), (0, 3), (8, 1), (2**62, 2)):
        table = torch.tensor([entry])
        with pytest.raises(EmulationError, match="trap"):
            multiply(kernel, codes, None, 1, panel, 1, packed, table, 0, 32, out)
    codes.scale[1, 0] = torch.nan
    multiply(kernel, codes, None, 1, None, 1, packed, None, 2, 32, out)
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()


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
