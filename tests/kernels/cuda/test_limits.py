"""Launches of very large calls: grids, threads and shared memory are what every card takes.

No kernel runs, and the memory of the tensors is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moepress.format.codec import CODE_BITS, FAMILIES, Codec, PackedSpec
from moepress.kernels import cuda
from moepress.kernels.cuda import drawn, launch, rotation, values
from moepress.kernels.cuda.launch import Argument
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.matrix import PackedMatrix
from moepress.kernels.router import Formula
from tests.kernels.cuda.emulate import EmulationError, check_limits

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []

    def check(
        kernel: str, grid: launch.Grid, block: int, shared: int, args: Sequence[Argument]
    ) -> None:
        check_limits(kernel, grid, block, shared)
        names.append(kernel)

    launcher = launch.Launcher(check, multiprocessors=132)
    monkeypatch.setitem(launch.LAUNCHERS, "cpu", lambda device: launcher)
    yield names
    assert names


def packed(codec: Codec, rows: int, cols: int) -> Tensor:
    return torch.empty(codec.nbytes(rows, cols), dtype=torch.uint8)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "tokens, rows, cols",
    [(70000, 1, 4096), (1, 262144, 7168), (40000, 262144, 32), (1 << 20, 64, 32)],
)
def test_linear(family: str, bits: int, tokens: int, rows: int, cols: int) -> None:
    codec = Codec(2, 32, family)
    x = torch.empty(tokens, cols, dtype=BF16)
    y = cuda.linear(x, packed(codec, rows, cols), None, rows, codec, bits)
    assert y.shape == (tokens, rows)


def test_linears() -> None:
    codec = Codec(3.5, 128, "trellis")
    given = [PackedMatrix(packed(codec, n, 8192), n, codec) for n in (65536, 8192, 1, 262144)]
    assert cuda.linears(torch.empty(16, 8192, dtype=BF16), given, 16).shape[0] == 16


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "count, k, tokens, hidden, inner",
    [
        (512, 22, 70000, 256, 64),
        (8, 2, 40000, 16384, 1024),
        (1, 1, 70000, 64, 64),
        (512, 8, 1, 64, 64),
        (384, 8, 512, 7168, 2048),
        (2048, 8, 512, 64, 64),
    ],
)
def test_experts(
    family: str, bits: int, count: int, k: int, tokens: int, hidden: int, inner: int
) -> None:
    spec = PackedSpec((CODE_BITS[family][1],) * count, 32, family)
    shapes = (2 * inner, hidden), (hidden, inner)
    call = ExpertsCall(
        torch.empty(tokens, hidden, dtype=BF16),
        torch.empty(tokens, k, dtype=torch.int64),
        torch.empty(tokens, k, dtype=BF16),
        *(torch.empty(spec.nbytes(*shape), dtype=torch.uint8) for shape in shapes),
        *(torch.tensor(spec.table(*shape)) for shape in shapes),
        inner, 32, 32, "silu", bits, family,
    )  # fmt: skip
    assert cuda.experts(call).shape == (tokens, hidden)


def test_embedding_and_drop() -> None:
    codec = Codec(4, 32)
    ids = torch.zeros(1, 1 << 20, dtype=torch.int64)
    assert cuda.embedding(ids, packed(codec, 9, 32), 9, 32, codec, BF16).shape == (1, 1 << 20, 32)
    index, weights = torch.zeros(1 << 20, 8, dtype=torch.int64), torch.zeros(1 << 20, 8)
    cuda.drop(index, weights, torch.zeros(8), True, None, 64)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_attention(dtype: torch.dtype) -> None:
    for batches, heads, shared, positions, size in (
        (1, 128, 1, 1 << 20, 256),
        (500, 128, 8, 64, 64),
        (1000, 64, 64, 100, 8),
        (1, 8, 8, 1, 128),
    ):
        q = torch.empty(batches, heads, 1, size, dtype=dtype)
        k = torch.empty(batches, shared, positions, size, dtype=dtype)
        assert cuda.attention(q, k, k, None, 0.1).shape == (batches, 1, heads, size)


def test_small_ops() -> None:
    x = torch.empty(1 << 20, 128, dtype=BF16)
    assert cuda.rms_norm(x, None, 1e-5, "wide").shape == x.shape
    q, angles = torch.empty(2, 128, 65535, 8, dtype=BF16), torch.empty(1, 65535, 8, dtype=BF16)
    assert cuda.rotary(q, q[:, :8], angles, angles, "halves", False)[0].shape == q.shape
    held, one = torch.empty(16, 128, 9, 8), torch.empty(16, 128, 1, 8)
    cuda.cache_write(held, held.clone(), one, one, torch.tensor(0))
    for tokens, experts in ((1, 1024), (128, 1024), (128, 1), (1, 1)):
        hidden, weight = torch.empty(tokens, 7168), torch.empty(experts, 7168)
        cuda.route(hidden, weight, None, None, min(32, experts), Formula("softmax"))


def test_compression() -> None:
    assert rotation.rotate(torch.empty(1 << 18, 4096, dtype=BF16)).shape == (1 << 18, 4096)
    branches = torch.empty(1 << 20, 8, dtype=torch.uint8)
    assert values.code_matrix(branches, 2).shape == branches.shape
    target, received = torch.empty(64, 1 << 18), torch.empty(64, 7, 1 << 18)
    drawn.drawing(target, received, received.clone(), torch.empty(7), target)(0, 8)


def test_what_no_card_takes() -> None:
    check_limits("a kernel", (1, 65535, 65535), 1024, 99 << 10)
    for grid, block, shared in (
        ((0, 1, 1), 32, 0),
        ((1, 65536, 1), 32, 0),
        ((1, 1, 65536), 32, 0),
        ((1 << 31, 1, 1), 32, 0),
        ((1, 1, 1), 1056, 0),
        ((1, 1, 1), 32, 100 << 10),
    ):
        with pytest.raises(EmulationError):
            check_limits("a kernel", grid, block, shared)
    rotation.rotate(torch.empty(1, 32))
