"""Products of trellis matrices on the emulated card, against kernels/trellis.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moepress.format.codec import Codec
from moepress.kernels import trellis
from moepress.kernels.cuda import trellis_products
from tests.kernels.cuda.emulate import launch, needs_compiler

pytestmark = needs_compiler


@dataclass(frozen=True)
class Product:
    """Random packed matrices, activations and routing, and the product that they must give."""

    rows: int
    cols: int
    group: int
    planes: int
    packed: Tensor
    table: Tensor
    q: Tensor  # [planes, rows, K] int8
    scale: Tensor
    sum: Tensor
    expected: Tensor  # [positions, N] float64
    size: Tensor  # sums of the sizes of all terms


def random_product(
    bits: tuple[int, ...], rows: int, cols: int, group: int, planes: int, experts: list[int],
    tokens: list[int], seed: int = 0,
) -> Product:  # fmt: skip
    """`experts[p]` and `tokens[p]`: the expert and the row of q of position p."""
    g = torch.Generator().manual_seed(seed)
    slabs = -(-rows // 64)
    matrices, values, table, at = [], [], [], 64  # 64 bytes before the first matrix
    for b in bits:
        table.append([at, b])
        if b == 0:
            values.append(torch.zeros(rows, cols, dtype=torch.float64))
            continue
        codec = Codec(b, group, "trellis")
        branches = torch.randint(0, 1 << b, (64 * slabs, cols), generator=g, dtype=torch.uint8)
        scales = torch.randn(rows, generator=g).bfloat16()
        matrices.append(trellis.pack(branches, scales, codec))
        at += len(matrices[-1])
        exact = trellis.code_matrix(branches, b)[:rows].double()
        values.append(exact * scales.double()[:, None])
    count = max(tokens) + 1
    q = torch.randint(-127, 128, (planes, count, cols), generator=g, dtype=torch.int8)
    scale = torch.rand(count, cols // group, generator=g) + 0.5
    whole = q[0].long() if planes == 1 else 128 * q[0].long() + q[1].long()
    x = whole.view(count, -1, group).double() * scale.double()[..., None]
    x = x.view(count, cols)[tokens]
    return Product(
        rows, cols, group, planes,
        torch.cat([torch.zeros(64, dtype=torch.uint8), *matrices]), torch.tensor(table),
        q, scale, whole.view(count, -1, group).sum(-1).int(),
        torch.stack([values[e] @ x[p] for p, e in enumerate(experts)]),
        torch.stack([values[e].abs() @ x[p].abs() for p, e in enumerate(experts)]),
    )  # fmt: skip


def panels(experts: list[int], size: int, unused: int = 1) -> Tensor:
    """Panels of sorted positions: (expert, first, count), and some without work."""
    found: list[list[int]] = []
    for p, e in enumerate(experts):
        if found and found[-1][0] == e and found[-1][2] < size:
            found[-1][2] += 1
        else:
            found.append([e, p, 1])
    return torch.tensor(found + [[0, 0, 0]] * unused, dtype=torch.int32)


def check(
    product: Product, kernel: str, how: trellis_products.Launch, pair: Tensor | None,
    panel: Tensor | None, choices: int, bits: int = 0,
) -> None:  # fmt: skip
    positions = len(product.expected)
    out = torch.full((how.splits, positions, product.rows), torch.nan)
    table = None if panel is None else product.table
    packed = product.packed if panel is not None else product.packed[64:]
    launch(
        f"moepress_trellis_{kernel}_{8 * product.planes}", how.grid, how.block, how.shared,
        [out, packed, table, product.q, product.scale, product.sum, pair, panel, product.rows,
         product.cols, product.group, bits, product.q.shape[1], positions, choices, how.splits,
         how.slabs],
    )  # fmt: skip
    error = (out.double().sum(0) - product.expected).abs() / product.size
    assert error.max() < 3e-7


def routed(
    kernel: str, bits: tuple[int, ...], rows: int, cols: int, group: int, planes: int,
    counts: list[int], size: int, how: trellis_products.Launch, choices: int = 0,
) -> None:  # fmt: skip
    """`counts[e]` positions of expert e, in panels of `size`."""
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    pair = torch.randperm(len(experts), generator=torch.Generator().manual_seed(1)).int()
    tokens = [int(p) // choices for p in pair] if choices else list(range(len(experts)))
    product = random_product(bits, rows, cols, group, planes, experts, tokens)
    panel = panels(experts, size)
    how = replace(how, grid=(how.grid[0], how.grid[1], len(panel)))
    check(product, kernel, how, pair if choices else None, panel, choices)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_decode_one_matrix(bits: int, planes: int) -> None:
    tokens = 11
    product = random_product((bits,), 130, 256, 64, planes, [0] * tokens, list(range(tokens)))
    size = trellis_products.panel_size(planes)
    how = trellis_products.decode_launch(130, 256, -(-tokens // size), 132)
    check(product, "decode", how, None, None, 0, bits)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("rows", "cols", "group"), [(64, 96, 32), (200, 1152, 128), (8, 192, 64)])
def test_decode_experts_of_mixed_widths(rows: int, cols: int, group: int, planes: int) -> None:
    how = trellis_products.decode_launch(rows, cols, 8, 132)
    size = trellis_products.panel_size(planes)
    routed("decode", (2, 3, 1, 4, 2), rows, cols, group, planes, [1, 9, 0, 3, 2], size, how, 3)


@pytest.mark.parametrize("slabs", [1, 2, 4])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_splits(splits: int, slabs: int) -> None:
    how = trellis_products.decode_launch(64, 4096, 1, 132)
    assert how.splits > 1
    grid = (-(-3 // slabs), splits, 1)
    how = replace(how, splits=splits, slabs=slabs, grid=grid)
    routed("decode", (2,), 140, 1664, 128, 1, [2], 8, how)
