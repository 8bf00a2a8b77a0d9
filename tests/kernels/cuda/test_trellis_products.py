"""Products of trellis matrices on the emulated card, against kernels/trellis.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.format.codec import TRELLIS_BITS, Codec, width_number
from moepress.kernels import trellis
from moepress.kernels.cuda.products import FEW, MANY
from tests.kernels.cuda.emulate import SOURCES as FOLDER
from tests.kernels.cuda.emulate import EmulationError, needs_compiler, run

pytestmark = needs_compiler

HERE = Path(__file__).parent
SOURCES = {
    "decode": FOLDER / "trellis_decode.cu",
    "prefill": FOLDER / "trellis_prefill.cu",
    "prefill by warps": HERE / "trellis_prefill_by_warps.cu",
}


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


def random_branches(rows: int, cols: int, bits: float, generator: torch.Generator) -> Tensor:
    branches = torch.randint(0, 256, (rows, cols), generator=generator, dtype=torch.uint8)
    by_step = branches.view(rows, -1, 2, 2)
    for step, width in enumerate(trellis.branch_bits(bits)):
        by_step[:, :, step] &= (1 << width) - 1
    return branches


def random_product(
    bits: tuple[float, ...], rows: int, cols: int, group: int, planes: int, experts: list[int],
    tokens: list[int], seed: int = 0,
) -> Product:  # fmt: skip
    """`experts[p]` and `tokens[p]`: the expert and the row of q of position p."""
    g = torch.Generator().manual_seed(seed)
    slabs = -(-rows // 64)
    matrices, values, table, at = [], [], [], 64  # 64 bytes before the first matrix
    for b in bits:
        table.append([at, width_number(b)])
        if b == 0:
            values.append(torch.zeros(rows, cols, dtype=torch.float64))
            continue
        codec = Codec(b, group, "trellis")
        branches = random_branches(64 * slabs, cols, b, g)
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
    product: Product, kernel: str, grid: tuple[int, int, int], pair: Tensor | None,
    panel: Tensor | None, choices: int, bits: float = 0,
) -> None:  # fmt: skip
    how = (FEW if kernel == "decode" else MANY)["trellis"]
    positions = len(product.expected)
    out = torch.full((grid[1], positions, product.rows), torch.nan)
    table = None if panel is None else product.table
    packed = product.packed if panel is not None else product.packed[64:]
    q = product.q
    if how.halves:
        q = torch.unflatten(q, -1, (-1, 4, 2, 4)).transpose(-3, -2).flatten(-4).contiguous()
    run(
        SOURCES[kernel], how.name(product.group, product.planes), grid, how.threads,
        how.shared(product.cols, product.group, grid[1], product.planes),
        [q, product.scale, product.sum, product.planes, product.q.shape[1], pair, choices,
         panel, positions, packed, len(packed), table, width_number(bits),
         product.rows, product.cols, product.group, out, grid[1]],
    )  # fmt: skip
    error = (out.double().sum(0) - product.expected).abs() / product.size
    assert error.max() < 3e-7


def routed(
    kernel: str, bits: tuple[float, ...], rows: int, cols: int, group: int, planes: int,
    counts: list[int], grid: tuple[int, int], choices: int = 0,
) -> None:  # fmt: skip
    """`counts[e]` positions of expert e; `grid`: blocks of rows, splits."""
    how = (FEW if kernel == "decode" else MANY)["trellis"]
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    pair = torch.randperm(len(experts), generator=torch.Generator().manual_seed(1)).int()
    tokens = [int(p) // choices for p in pair] if choices else list(range(len(experts)))
    product = random_product(bits, rows, cols, group, planes, experts, tokens)
    panel = panels(experts, how.panel(planes))
    check(product, kernel, (*grid, len(panel)), pair if choices else None, panel, choices)


@pytest.mark.parametrize("kernel", SOURCES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_one_matrix(kernel: str, bits: float, planes: int) -> None:
    how = (FEW if kernel == "decode" else MANY)["trellis"]
    size = how.panel(planes)
    tokens = size + 3
    product = random_product((bits,), 130, 256, 64, planes, [0] * tokens, list(range(tokens)))
    check(product, kernel, (how.row_blocks(130), 1, 2), None, None, 0, bits)


@pytest.mark.parametrize("kernel", SOURCES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("rows", "cols", "group"), [(64, 96, 32), (200, 1152, 128), (8, 192, 64)])
def test_experts_of_mixed_widths(
    kernel: str, rows: int, cols: int, group: int, planes: int
) -> None:
    blocks = (FEW if kernel == "decode" else MANY)["trellis"].row_blocks(rows)
    counts = [1, 9, 0, 3, 2, 1] if kernel == "decode" else [1, 70, 0, 30, 9, 2]
    routed(kernel, (2, 3.5, 1, 4, 1.5, 2.5), rows, cols, group, planes, counts, (blocks, 1), 3)


@pytest.mark.parametrize("kernel", SOURCES)
@pytest.mark.parametrize("splits", [1, 3])
def test_splits(kernel: str, splits: int) -> None:
    for slabs in (1, 2, 4) if kernel == "decode" else (1,):
        routed(kernel, (2,), 140, 1664, 128, 1, [2], (-(-3 // slabs), splits))


def test_a_table_that_does_not_fit() -> None:
    product = random_product((2,), 64, 128, 128, 1, [0], [0])
    product.table[0, 0] += 64
    with pytest.raises(EmulationError, match="trap"):
        check(product, "decode", (1, 1, 2), None, panels([0], 8), 0)
