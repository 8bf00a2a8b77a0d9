"""Parts of a packed trellis matrix: together they are the matrix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import HALF_WIDTHS, ROWS_PER_SLAB, TRELLIS_BITS, Codec
from moepress.kernels import backends, reference
from moepress.kernels.shards import columns_part, rows_part
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
            far = (
                0
                if backend == "cpu" and bits not in HALF_WIDTHS
                else 2e-6 * float(whole.abs().max())
            )
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
