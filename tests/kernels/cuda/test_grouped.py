"""Weights decoded to bfloat16 on the emulated card, and the operations by torch's products of them.

On the CPU, `grouped_mm` is torch's own for CPUs.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moepress.format.codec import CODE_BITS, Codec, PackedSpec
from moepress.kernels import cuda, reference, trellis
from moepress.kernels.cuda import grouped, products
from moepress.kernels.cuda.launch import launcher_for
from moepress.kernels.experts_call import ExpertsCall
from tests.kernels.cuda import emulate
from tests.kernels.cuda.test_ops import experts_call, random_packed

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]

HERE = torch.device("cpu")
CODECS = [Codec(b, 32, family) for family, widths in CODE_BITS.items() for b in widths]


def weights(packed: Tensor, rows: int, cols: int, codec: Codec) -> Tensor:
    """[N, K] bfloat16; trellis weights stay rotated."""
    strips = trellis.strips if codec.family == "trellis" else reference._strips
    return torch.cat([w for _, w in strips(packed, rows, cols, codec)]).bfloat16()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_a_decoded_matrix(codec: Codec, group: int) -> None:
    codec = dataclasses.replace(codec, group_size=group)
    for rows, cols in ((130, 5 * group), (64, 640), (16, 128)):
        packed = random_packed(rows, cols, codec)
        given = codec.number, codec.family, group, None, rows, cols
        matrices = grouped._Matrices(packed, None, *given)
        scratch = torch.full((rows * cols,), torch.nan, dtype=torch.bfloat16)
        (found,) = matrices.rows_from(launcher_for(HERE), scratch, 0, None, rows)
        assert found.equal(weights(packed, rows, cols, codec))


def test_every_zero_of_scalar_codes() -> None:
    for bits in (2, 3, 4):
        codec = Codec(bits, 32)
        packed = random_packed(256, 64, codec)
        blocks = packed[: 16 * codec.block_bytes(64)].view(16, -1)
        blocks[:, -32:] = torch.arange(256, dtype=torch.uint8).repeat(2).view(16, 32)
        matrices = grouped._Matrices(packed, None, bits, "int", 32, None, 256, 64)
        scratch = torch.empty(256 * 64, dtype=torch.bfloat16)
        (found,) = matrices.rows_from(launcher_for(HERE), scratch, 0, None, 256)
        assert found.equal(weights(packed, 256, 64, codec))


@pytest.mark.parametrize("family", CODE_BITS)
def test_rows_of_experts_of_mixed_widths(family: str) -> None:
    """Two ranges of rows that begin within a slab; panels in any order, some without positions."""
    rows, cols, widths = 180, 64, (*CODE_BITS[family], 0, 2)
    spec = PackedSpec(widths, 32, family)
    codecs = [Codec(b, 32, family) for b in widths if b]
    each = [random_packed(rows, cols, c, e) for e, c in enumerate(codecs)]
    values = [weights(p, rows, cols, c) for p, c in zip(each, codecs, strict=True)]
    last = len(widths) - 1
    panel = torch.tensor([[2, 0, 3], [0, 3, 1], [1, 4, 0], [last, 4, 5], [0, 0, 0]]).int()
    table = torch.tensor(spec.table(rows, cols))
    matrices = grouped._Matrices(torch.cat(each), table, 0, family, 32, panel.flatten(), rows, cols)
    for first, second, count in ((0, 90, 90), (70, 113, 29), (64, None, 64), (176, None, 4)):
        total = count if second is None else 2 * count
        scratch = torch.full((5 * total * cols + 8,), torch.nan, dtype=torch.bfloat16)
        found = matrices.rows_from(launcher_for(HERE), scratch, first, second, count)
        starts = [first] if second is None else [first, second]
        for place, expert in ((0, 2), (1, 0), (3, len(each) - 1)):
            expected = torch.cat([values[expert][s : s + count] for s in starts])
            assert found[place].equal(expected)
        assert found[[2, 4]].isnan().all() and scratch[5 * total * cols :].isnan().all()


@pytest.mark.parametrize("family", CODE_BITS)
def test_a_bad_table_stops_the_kernel(family: str) -> None:
    packed = random_packed(64, 64, Codec(2, 32, family))
    panel = torch.tensor([0, 0, 1], dtype=torch.int32)
    scratch = torch.empty(64 * 64, dtype=torch.bfloat16)
    for entry in ((0, 3), (64, 2), (-64, 2), (0, 7), (0, 0), (8, 1), (2**62, 1)):
        table = torch.tensor([entry])
        matrices = grouped._Matrices(packed, table, 0, family, 32, panel, 64, 64)
        with pytest.raises(emulate.EmulationError, match="trap"):
            matrices.rows_from(launcher_for(HERE), scratch, 0, None, 64)


def far(found: Tensor, oracle: Tensor) -> float:
    assert found.isfinite().all() and found.shape == oracle.shape
    return float((found.float() - oracle.float()).norm() / oracle.float().norm())


def small_chunks(monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    monkeypatch.setattr(grouped, "GRAIN", 32)
    monkeypatch.setattr(grouped, "SCRATCH_BYTES", scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_linear(codec: Codec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, cols = 100, 192
    small_chunks(monkeypatch, 32 * 2 * cols)
    packed, x, bias = random_packed(rows, cols, codec), torch.randn(40, cols), torch.randn(rows)
    x = x.to(dtype)
    for b in (None, bias, bias.to(dtype)):
        y = torch.full((40, rows), torch.nan, dtype=dtype)
        grouped.linear(x, packed, b, codec, y)
        wide = None if b is None else b.float()
        assert far(y, reference.linear(x.float(), packed, wide, rows, codec)) < 6e-3


@pytest.mark.parametrize("scratch", [1, 1 << 30])
@pytest.mark.parametrize("tokens, k", [(1, 2), (3, 4), (60, 2)])
@pytest.mark.parametrize("family", CODE_BITS)
def test_experts(
    family: str, tokens: int, k: int, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, scratch)
    call = experts_call(family, tokens, k, 8, "silu")
    call.top_k_index[0, 0] = 1
    oracle = reference.experts(call)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = dataclasses.replace(
            call, hidden=call.hidden.to(dtype), top_k_weights=call.top_k_weights.to(dtype)
        )
        y = torch.full_like(given.hidden, torch.nan)
        grouped.experts(given, y)
        assert far(y, oracle) < 1.2e-2


@pytest.mark.parametrize("hidden, inner", [(512, 384), (192, 768)])
@pytest.mark.parametrize("family", CODE_BITS)
def test_units_of_every_length(
    family: str, hidden: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks may divide by a longer unit than the rows that they are cut from."""
    monkeypatch.setattr(grouped, "GRAIN", 256)
    monkeypatch.setattr(grouped, "SCRATCH_BYTES", 1)
    torch.manual_seed(0)
    spec, shapes = PackedSpec((2, 3), 64, family), ((2 * inner, hidden), (hidden, inner))
    packed = [
        torch.cat([random_packed(*shape, c, i) for i, c in enumerate(spec.codecs)])
        for shape in shapes
    ]
    tables = [torch.tensor(spec.table(*shape)) for shape in shapes]
    index, weights = torch.randint(0, 2, (9, 1)), torch.rand(9, 1)
    call = ExpertsCall(
        torch.randn(9, hidden), index, weights, *packed, *tables, inner, 64, 64, "silu", 8, family
    )
    y = torch.empty_like(call.hidden)
    grouped.experts(call, y)
    assert far(y, reference.experts(call)) < 1.2e-2


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_activations(activation: str) -> None:
    call = experts_call("trellis", 20, 2, 8, activation)
    y = torch.empty_like(call.hidden)
    grouped.experts(call, y)
    assert far(y, reference.experts(call)) < 1.2e-2


def test_no_choice_and_no_other_token() -> None:
    """Choices of no expert give 0. A token that is NaN spoils no other."""
    call = experts_call("trellis", 20, 2, 8, "silu")
    y, z = torch.empty_like(call.hidden), torch.empty_like(call.hidden)
    call.top_k_index[4] = -1
    grouped.experts(call, y)
    assert y[4].eq(0).all()
    call.top_k_index[7] = torch.tensor([1, 0])
    grouped.experts(call, y)
    call.hidden[7, 3] = torch.nan
    grouped.experts(call, z)
    assert z[7].isnan().all()
    others = [t for t in range(20) if t != 7]
    assert z[others].equal(y[others])
    call.top_k_index.fill_(5)
    grouped.experts(call, y)
    assert y.eq(0).all()


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "GROUPED_PER_EXPERT", 10)
    monkeypatch.setattr(products, "GROUPED_ROWS", 10)
    call, few = (experts_call("int", t, 2, 8, "silu") for t in (25, 24))
    x = call.hidden
    assert not grouped.takes_experts(call) and not grouped.takes_linear(x, 8)  # not a card
    monkeypatch.setattr(grouped, "_new_enough", lambda device: True)
    assert grouped.takes_experts(call) and not grouped.takes_experts(few)
    assert not grouped.takes_experts(dataclasses.replace(call, activation_bits=16))
    assert grouped.takes_linear(x, 8) and not grouped.takes_linear(x, 16)
    assert not grouped.takes_linear(x[:9], 8)
    monkeypatch.setattr(grouped, "MOST_SCRATCH_BYTES", 1000)
    assert not grouped.takes_experts(call)


def test_operations_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_new_enough", lambda device: True)
    monkeypatch.setattr(products, "GROUPED_PER_EXPERT", 1)
    monkeypatch.setattr(products, "GROUPED_ROWS", 1)
    call = experts_call("int", 20, 2, 8, "silu")
    y = torch.empty_like(call.hidden)
    grouped.experts(call, y)
    assert cuda.experts(call).equal(y)
    codec = Codec(3, 64)
    packed, x = random_packed(70, 128, codec), torch.randn(2, 5, 128)
    y = torch.empty(10, 70)
    grouped.linear(x.view(10, 128), packed, None, codec, y)
    assert cuda.linear(x, packed, None, 70, codec, 8).view(10, 70).equal(y)


def test_chunks() -> None:
    assert grouped._chunk(14336, 4 * 8 * 4096, 128) == 3584  # Mixtral-8x7B: gate and up
    assert grouped._chunk(4096, 2 * 8 * 14336, 128) == 2048  # and down
    assert grouped._chunk(768, 4 * 128 * 2048, 256) == 512  # Qwen3-30B-A3B
    assert grouped._chunk(100, 2 * 4096, 128) == 128
    assert grouped._chunk(2048, 1 << 30, 128) == 128
