"""Several matrices with the same inputs in one launch, emulated, against one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moepress.format.codec import Codec
from moepress.kernels import cuda, reference
from moepress.kernels.cuda import several
from moepress.kernels.matrix import PackedMatrix
from tests.kernels.cuda import emulate
from tests.kernels.cuda.test_ops import close, random_packed

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]


def matrices(
    rows: Sequence[int], bits: Sequence[float], cols: int, group: int
) -> list[PackedMatrix]:
    found = []
    for seed, (n, b) in enumerate(zip(rows, bits, strict=True)):
        codec = Codec(b, group, "trellis")
        found.append(PackedMatrix(random_packed(n, cols, codec, seed), n, codec))
    return found


def expected(x: Tensor, given: Sequence[PackedMatrix], activation_bits: int) -> Tensor:
    each = [
        reference.linear(x, m.weight, None, m.rows, m.codec, activation_bits, rounded=True)
        for m in given
    ]
    return torch.cat(each, -1)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 5, 11])
@pytest.mark.parametrize(
    "rows, bits, cols, group",
    [
        ((256, 64, 64), (4, 3, 2), 256, 128),
        ((100, 1), (1, 2.5), 192, 64),
        ((64, 640, 30, 64), (1.5, 3.5, 4, 2), 96, 32),
        ((70,), (2,), 128, 128),
    ],
)
def test_products_are_those_of_the_matrices(
    rows: tuple[int, ...],
    bits: tuple[float, ...],
    cols: int,
    group: int,
    tokens: int,
    activation_bits: int,
) -> None:
    torch.manual_seed(0)
    x, given = torch.randn(tokens, cols), matrices(rows, bits, cols, group)
    assert several.takes(tokens, given)
    found = cuda.linears(x[None], given, activation_bits)
    close(found, expected(x, given, activation_bits)[None])


def test_many_slabs_share_blocks() -> None:
    """As many row blocks as need two or four slabs of a block, in matrices that do not divide."""
    given = matrices((64 * 13, 64 * 6 + 3, 64), (1, 2, 3), 128, 128)
    x = torch.randn(2, 128)
    close(cuda.linears(x, given, 8), expected(x, given, 8))


def test_other_calls_are_one_by_one() -> None:
    few = matrices((64, 64), (2, 2), 128, 128)
    scalar = Codec(2, 128, "int")
    other = PackedMatrix(random_packed(64, 128, scalar), 64, scalar)
    assert not several.takes(17, few) and not several.takes(0, few)
    assert not several.takes(1, [other]) and not several.takes(1, [few[0], other])
    assert not several.takes(1, few * 3)
    x = torch.randn(1, 128)
    found = cuda.linears(x, [few[0], other], 8)
    close(found[:, :64], expected(x, few[:1], 8))
    close(found[:, 64:], cuda.linear(x, other.weight, None, 64, scalar, 8))
    assert cuda.linears(x.double(), few, 8).dtype == torch.float64
    assert cuda.linears(x[:0], few, 8).shape == (0, 128)


def test_a_matrix_that_reaches_outside_its_bytes_stops_the_kernel() -> None:
    given = matrices((64, 128), (2, 2), 128, 128)
    short = PackedMatrix(given[1].weight[:-64], 128, given[1].codec)
    with pytest.raises(emulate.EmulationError, match="trap"):
        cuda.linears(torch.randn(1, 128), [given[0], short], 8)
