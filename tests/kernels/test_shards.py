"""Parts of a packed matrix, and of packed experts: together they are the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import GRID_BITS, ROWS_PER_SLAB, TRELLIS_BITS, Codec, PackedSpec
from moepress.kernels import backends, reference, scalar
from moepress.kernels.expert_shards import cut_experts, expert_bytes, keep_experts
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts
from moepress.kernels.shards import columns_part, cut_columns, cut_rows, rows_part
from tests.rounding.test_trellis import random_packed


def cuts(size: int, parts: int, unit: int) -> list[tuple[int, int]]:
    """Ranges of whole units, as equal as possible; the last may end inside a unit."""
    units = -(-size // unit)
    edges = [unit * (units * i // parts) for i in range(parts)] + [size]
    return list(pairwise(edges))


def product(x: torch.Tensor, packed: torch.Tensor, rows: int, codec: Codec) -> torch.Tensor:
    y: torch.Tensor = kernels.linear(
        x, packed, None, rows, codec.number, codec.group_size, 8, codec.family
    )
    return y


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_products_of_columns_add_up(backend: str, bits: float, parts: int) -> None:
    rows, cols, codec = 100, 9 * 256, Codec(bits, 64, "trellis")
    packed = random_packed(rows, cols, codec)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(codec.number))
    with backends.only(backend):
        whole = product(x, packed, rows, codec)
        total = torch.zeros_like(whole)
        for start, stop in cuts(cols, parts, 256):
            part = columns_part(packed, rows, cols, codec, start, stop)
            total += product(x[:, start:stop], part, rows, codec)
    torch.testing.assert_close(total, whole, rtol=0, atol=2e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_products_of_rows_are_those_of_the_matrix(backend: str, bits: float, parts: int) -> None:
    rows, cols, codec = 8 * 64 + 70, 128, Codec(bits, 128, "trellis")
    packed = random_packed(rows, cols, codec)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(codec.number))
    with backends.only(backend):
        whole = product(x, packed, rows, codec)
        for start, stop in cuts(rows, parts, ROWS_PER_SLAB):
            part = rows_part(packed, rows, cols, codec, start, stop)
            size = stop - start + -(stop - start) % ROWS_PER_SLAB + ROWS_PER_SLAB
            y = product(x, part, size, codec)
            # The reference's float32 sums depend on the shape of the product, those on CPUs do not.
            far = 0 if backend == "cpu" else 2e-6 * float(whole.abs().max())
            torch.testing.assert_close(y[:, : stop - start], whole[:, start:stop], rtol=0, atol=far)
            assert y[:, -ROWS_PER_SLAB:].eq(0).all()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_an_mlp_cut_by_rows_then_by_columns(parts: int) -> None:
    """As devices share it: the rows of up, then the same columns of down; one sum at the end."""
    hidden, inner, codec = 128, 8 * 256, Codec(2, 128, "trellis")
    up, down = random_packed(inner, hidden, codec), random_packed(hidden, inner, codec, 1)
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    whole = product(F.silu(product(x, up, inner, codec)), down, hidden, codec)
    total = torch.zeros_like(whole)
    for start, stop in cuts(inner, parts, 256):
        rows = rows_part(up, inner, hidden, codec, start, stop)
        h = product(x, rows, stop - start + ROWS_PER_SLAB, codec)[:, : stop - start]
        part = columns_part(down, hidden, inner, codec, start, stop)
        total += product(F.silu(h), part, hidden, codec)
    torch.testing.assert_close(total, whole, rtol=0, atol=2e-6 * float(whole.abs().max()))


def test_weights_of_parts_are_those_of_the_matrix() -> None:
    rows, cols, codec = 200, 512, Codec(2.5, 32, "trellis")
    packed = random_packed(rows, cols, codec)
    whole = reference.dequantize(packed, rows, cols, codec)
    right = columns_part(packed, rows, cols, codec, 256, 512)
    assert torch.equal(reference.dequantize(right, rows, 256, codec), whole[:, 256:])
    low = rows_part(packed, rows, cols, codec, 128, 200)
    assert torch.equal(reference.dequantize(low, 192, cols, codec)[:72], whole[128:])


@pytest.mark.parametrize("start, stop", [(0, 128), (128, 512), (256, 256), (256, 768), (-256, 256)])
def test_other_columns_are_refused(start: int, stop: int) -> None:
    codec = Codec(2, 64, "trellis")
    with pytest.raises(InputError, match="are no part"):
        columns_part(random_packed(64, 512, codec), 64, 512, codec, start, stop)


def test_other_rows_are_refused() -> None:
    codec = Codec(2, 64, "trellis")
    with pytest.raises(InputError, match="expected multiples of 64"):
        rows_part(random_packed(200, 64, codec), 200, 64, codec, 32, 128)


def some_packed(rows: int, cols: int, codec: Codec, seed: int = 0) -> torch.Tensor:
    """A random packed matrix of either family, its scales between 0.01 and 0.02."""
    if codec.family == "trellis":
        return random_packed(rows, cols, codec, seed)
    chance = torch.Generator().manual_seed(seed)
    shape = rows, codec.groups(cols)
    codes = torch.randint(codec.levels + 1, (rows, cols), generator=chance, dtype=torch.uint8)
    scales = (0.01 + 0.01 * torch.rand(shape, generator=chance)).bfloat16()
    zeros = torch.randint(256, shape, generator=chance, dtype=torch.uint8)
    return scalar.pack(codes, scales, zeros if codec.has_zero else None, codec)


CODECS = [Codec(bits, 32) for bits in GRID_BITS] + [Codec(2, 64, "trellis")]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_cut_has_the_wanted_rows_and_columns(codec: Codec) -> None:
    rows, cols = 200, 3 * 256
    packed = some_packed(rows, cols, codec)
    whole = reference.dequantize(packed, rows, cols, codec)
    for wanted in (range(200), range(100), range(70, 150), range(129, 200)):
        cut = cut_rows(packed, rows, cols, codec, wanted)
        part = reference.dequantize(cut.packed, cut.size, cols, codec)
        assert torch.equal(part[cut.before :][: len(wanted)], whole[wanted.start : wanted.stop])
    for wanted in (range(cols), range(384), range(384, 768), range(300, 400)):
        cut = cut_columns(packed, rows, cols, codec, wanted)
        part = reference.dequantize(cut.packed, rows, cut.size, codec)
        assert torch.equal(
            part[:, cut.before :][:, : len(wanted)], whole[:, wanted.start : wanted.stop]
        )
        assert cut.size <= len(wanted) + 2 * 256


def test_columns_that_would_be_rotated_otherwise_are_not_cut() -> None:
    codec = Codec(2, 32, "trellis")
    packed = random_packed(64, 96, codec)  # runs of 32; a part of 64 columns would have one of 64
    assert cut_columns(packed, 64, 96, codec, range(64)).size == 96
    with pytest.raises(InputError, match="rotated in other runs"):
        columns_part(packed, 64, 96, codec, 0, 64)


def some_experts(family: str, inner: int, gated: bool, biased: bool) -> PackedExperts:
    """Random experts, one of which is left out."""
    hidden, bits, gate = 128, (2, 0, 3, 1), Gate("silu" if gated else "relu2", gated)
    specs = PackedSpec(bits, 64, family), PackedSpec(bits[:2] + bits[:1:-1], 64, family)
    made = PackedExperts(4, hidden, inner, *specs, gate, biased, biased)
    for spec, (rows, cols), name in zip(
        specs, made.shapes, (made.first_name, "down_proj"), strict=True
    ):
        matrices = [some_packed(rows, cols, spec.codec(expert), expert) for expert in (0, 2, 3)]
        made.get_parameter(name).data = torch.cat(matrices)
        if biased:
            bias = made.get_parameter(f"{name}_bias").data
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    return made


def outputs(module: PackedExperts) -> torch.Tensor:
    chance = torch.Generator().manual_seed(2)
    x = torch.randn(5, module.hidden_size, generator=chance)
    index = torch.stack([torch.randperm(4, generator=chance)[:2] for _ in range(5)])
    with backends.only("reference"), torch.inference_mode():
        y: torch.Tensor = module(x, index, torch.rand(5, 2, generator=chance) + 0.2)
    return y


@pytest.mark.parametrize("gated, biased", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("family", ["int", "trellis"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_outputs_of_parts_of_experts_add_up(
    family: str, gated: bool, biased: bool, ranks: int
) -> None:
    inner = 256 * 2 * ranks * (1 if family == "int" else 2)
    whole = some_experts(family, inner, gated, biased)
    wanted, bytes_of_whole = outputs(whole), sum(expert_bytes(whole))
    total = torch.zeros_like(wanted)
    for rank in range(ranks):
        part = some_experts(family, inner, gated, biased)
        assert cut_experts(part, rank, ranks)
        assert sum(expert_bytes(part)) < 1.5 * bytes_of_whole / ranks
        total += outputs(part)
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_experts_of_few_units_are_not_cut() -> None:
    module = some_experts("trellis", 256, gated=True, biased=False)
    wanted = outputs(module)
    assert not cut_experts(module, 0, 2)
    assert torch.equal(outputs(module), wanted)


def test_outputs_of_whole_experts_add_up() -> None:
    whole = some_experts("trellis", 256, gated=True, biased=True)
    wanted, sizes = outputs(whole), expert_bytes(whole)
    assert sizes[1] == 0 < sizes[3] < sizes[0]
    total = torch.zeros_like(wanted)
    for kept in ({0, 1}, {2, 3}):
        part = some_experts("trellis", 256, gated=True, biased=True)
        keep_experts(part, kept)
        assert expert_bytes(part) == [size if e in kept else 0 for e, size in enumerate(sizes)]
        assert len(part.down_proj) + len(part.first_proj) == sum(expert_bytes(part))
        total += outputs(part)
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    nothing = some_experts("trellis", 256, gated=True, biased=True)
    keep_experts(nothing, ())
    assert not outputs(nothing).any() and sum(expert_bytes(nothing)) == 0
