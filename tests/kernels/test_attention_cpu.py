"""Attention of few queries on each instruction set of this machine, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels import cpu, reference
from moepress.kernels.cpu import attention as kernel
from moepress.kernels.cpu import interface
from moepress.kernels.cpu.attention import MOST_SIZE, MOST_TOKENS, takes

MISSING = cpu.missing()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def qkv(
    batches: int,
    heads: int,
    group: int,
    tokens: int,
    positions: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        numbers(batches, heads * group, tokens, size, dtype=dtype, seed=1),
        numbers(batches, heads, positions, size, dtype=dtype, seed=2),
        numbers(batches, heads, positions, size, dtype=dtype, seed=3),
    )


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 0.2
) -> Tensor:
    """The op's result, which is that of the reference in float64 but for rounding."""
    found = kernels.attention(q, k, v, mask, scale)
    exact = reference.attention(q.double(), k.double(), v.double(), mask, scale)
    assert found.dtype == q.dtype and found.is_contiguous() and found.shape == exact.shape
    of = torch.finfo(q.dtype)
    rounding = of.eps / 2 * exact.abs().clamp(min=of.tiny)
    slack = 3e-6 * v.double().abs().amax() if v.numel() else 0  # of scores and sums in float32
    assert ((found.double() - exact).abs() <= rounding + slack).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12])
def test_groups(isa: str, group: int, dtype: torch.dtype, called: list[str]) -> None:
    for positions in (1, 2, 15, 16, 17, 40, 255, 256, 257, 600):
        q, k, v = qkv(2, 2, group, 1, positions, 64, dtype)
        check(q, k, v)
        check(q, k, v, numbers(2, 1, 1, positions, seed=4) > -1)
    assert set(called) == {"moepress_attention"} and len(called) == 20


def test_results_are_where_queries_are(called: list[str]) -> None:
    q, k, v = qkv(1, 2, 2, 1, 40, 64)
    with torch.device("meta"):  # the default of programs that set_default_device
        found = kernels.attention(q, k, v, None, 0.2)
    assert called and torch.equal(found, check(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_heads(isa: str, dtype: torch.dtype, called: list[str]) -> None:
    sizes = (1, 7, 8, 16, 20, 24, 64, 72, 80, 96, 100, 112, 128, 192, 256, 320, 511, 512)
    for size in sizes:
        for group in (1, 2, 4, 8):
            check(*qkv(1, 2, group, 1, 45, size, dtype), scale=size**-0.5)
    assert len(called) == 4 * len(sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_every_size(isa: str, dtype: torch.dtype) -> None:
    """Also those that float16 holds with fewer bits, and results that it cannot hold."""
    q, k, v = qkv(1, 1, 4, 1, 70, 64, dtype)
    for factor in (1e-6, 1e-3, 30.0):
        check(q, k, (v.float() * factor).to(dtype))
    check(q * 6, k * 6, v, scale=1.0)  # one key has nearly all the weight
    check(q * 0, k, v)  # all have the same
    check(q, k, torch.full_like(v, 60000))


def test_float16_rounds_as_torch_does(isa: str) -> None:
    """With one key, the result is the value itself; with two alike, the mean of two values."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    v = every.view(1, 256, 1, 256)
    q = k = torch.zeros(1, 256, 1, 256, dtype=torch.float16)
    torch.testing.assert_close(
        kernels.attention(q, k, v, None, 1.0)[:, 0], v[:, :, 0], rtol=0, atol=0, equal_nan=True
    )
    v = torch.cat([v, v.roll(1, 3)], 2)
    mean = ((v[:, :, 0].float() + v[:, :, 1].float()) / 2).half()
    found = kernels.attention(q, k.expand(1, 256, 2, 256), v, None, 1.0)[:, 0]
    torch.testing.assert_close(found, mean, rtol=0, atol=0, equal_nan=True)


def test_bfloat16_rounds_as_torch_does(isa: str) -> None:
    v = numbers(1, 64, 2, 256, dtype=torch.bfloat16)
    v[0, 0, :, :4] = torch.tensor([INF, -INF, torch.nan, 1e38])
    q, k = torch.zeros(1, 64, 1, 256).bfloat16(), torch.zeros(1, 64, 2, 256).bfloat16()
    mean = (v[:, :, 0].float() / 2 + v[:, :, 1].float() / 2).bfloat16()
    found = kernels.attention(q, k, v, None, 1.0)[:, 0]
    torch.testing.assert_close(found, mean, rtol=0, atol=0, equal_nan=True)


def test_weights_are_exponentials(isa: str) -> None:
    """Each of many scores beside a score of 0: e^s / (1 + e^s) to one in a million."""
    scores = torch.linspace(-80, 0, 4096)
    q, k = scores.view(1, 4096, 1, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    found = kernels.attention(q, k, v, None, 1.0).flatten().double()
    exact = torch.sigmoid(scores.double())
    assert ((found - exact).abs() < 1e-6 * exact).all()


def test_far_scores_weigh_nothing(isa: str) -> None:
    q, k = torch.ones(1, 1, 1, 8), torch.full((1, 1, 9, 8), -1e4)
    k[:, :, 4] = 1
    v = numbers(1, 1, 9, 8)
    assert torch.equal(kernels.attention(q, k, v, None, 1.0)[0, 0, 0], v[0, 0, 4])


# Strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(isa: str, dtype: torch.dtype, called: list[str]) -> None:
    """As models make them: heads beside each other, and a cache with more room than tokens."""
    q = numbers(2, 1, 8, 64, dtype=dtype).transpose(1, 2)
    k, v = numbers(2, 2, 300, 2, 64, dtype=dtype).transpose(2, 3).unbind(0)
    check(q, k, v)
    room = torch.full((2, 2, 2, 512, 64), torch.nan).to(dtype)
    room[..., :300, :] = torch.stack([k, v])
    check(q, *room[..., :300, :].unbind(0))
    check(q, k[:, :, ::3], v[:, :, ::3])
    check(q, k[:, :1].expand_as(k), v)
    check(q[..., ::2], k[..., ::2], v[..., 1::2])  # copied
    check(q.flip(3), k, v)
    assert len(called) == 6


# Masks


def masks(shape: tuple[int, int, int, int]) -> Iterator[Tensor]:
    """Bool masks, of all sizes that can be broadcast to a shape."""
    for sizes in torch.cartesian_prod(*(torch.tensor([0, 1]) for _ in shape)).tolist():
        part = [n if one else 1 for n, one in zip(shape, sizes, strict=True)]
        yield numbers(*part, seed=5) > -0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_masks(isa: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 3, 2, 300, 32, dtype)
    shape = (2, 6, 2, 300)
    for shown in masks(shape):
        check(q, k, v, shown)
        check(q, k, v, shown.expand(shape))
        for kind in DTYPES:
            hidden = torch.zeros(shown.shape, dtype=kind).masked_fill(~shown, -INF)
            check(q, k, v, hidden)
            bias = numbers(*shown.shape, dtype=kind, seed=6).masked_fill(~shown, -INF)
            check(q, k, v, bias)
            check(q, k, v, bias.expand(shape))


def test_one_token_of_many_masks(isa: str) -> None:
    q, k, v = qkv(3, 2, 4, 1, 300, 32)
    for shown in masks((3, 8, 1, 300)):
        check(q, k, v, shown)


def test_strided_masks(isa: str) -> None:
    q, k, v = qkv(1, 2, 4, 3, 300, 32)
    shown = numbers(300, 3, seed=5) > 0
    check(q, k, v, shown.T[None, None])
    check(q, k, v, numbers(1, 8, 3, 600, seed=5)[..., ::2])
    lowest = torch.zeros(1, 1, 1, 300).masked_fill(~shown[:, 0], torch.finfo(torch.float32).min)
    check(q, k, v, lowest)


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
@pytest.mark.parametrize("kind", [torch.bool, *DTYPES])
def test_hidden_positions_are_not_seen(isa: str, kind: torch.dtype, bad: float) -> None:
    in_between = (0, 300), (400, 640), (777, 778), (900, 999)
    for positions, runs in (
        (40, ((0, 7), (20, 21), (30, 40))), (999, in_between), (99, ((0, 98),)), (99, ((1, 99),)),
    ):  # fmt: skip
        q, k, v = qkv(1, 2, 4, 1, positions, 64)
        shown = torch.ones(positions, dtype=torch.bool)
        for first, end in runs:
            shown[first:end] = False
        expected = kernels.attention(q, k[:, :, shown], v[:, :, shown], None, 0.2)
        k, v = (x.masked_fill(~shown[:, None], bad) for x in (k, v))
        mask = torch.zeros(positions, dtype=kind)
        mask = shown if kind == torch.bool else mask.masked_fill(~shown, -INF)
        found = kernels.attention(q, k, v, mask[None, None, None], 0.2)
        torch.testing.assert_close(found, expected)


def test_what_one_query_sees_does_not_reach_another(isa: str) -> None:
    """Rows of a mask that differ, and numbers that are not finite where one query looks."""
    q, k, v = qkv(1, 1, 2, 2, 50, 32)
    shown = numbers(1, 2, 2, 50, seed=5) > 0
    shown[:, 1, 1, 30], shown[:, :, 0, 30], shown[:, 0, :, 30] = True, False, False
    expected = kernels.attention(q, k, v, shown, 0.2)
    v = v.clone()
    v[:, :, 30] = torch.nan
    found = kernels.attention(q, k, v, shown, 0.2)
    assert found[0, 1, 1].isnan().all()
    found[0, 1, 1] = expected[0, 1, 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("where", ["q", "k", "v", "mask"])
def test_numbers_that_are_not_finite_reach_the_result(isa: str, where: str) -> None:
    for bad in (torch.nan, INF, -INF):
        q, k, v = qkv(1, 1, 2, 1, 300, 32)
        mask = torch.zeros(1, 1, 1, 300)
        {"q": q, "k": k, "v": v, "mask": mask}[where].view(-1)[5] = bad
        found = kernels.attention(q, k, v, mask, 0.2)
        expected = reference.attention(q, k, v, mask, 0.2)
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, equal_nan=True)
    q, k, v = qkv(1, 1, 2, 1, 1, 32)
    assert kernels.attention(q, k * torch.nan, v, None, 0.2).isnan().all()


def test_a_query_that_sees_nothing_gets_zeros(isa: str) -> None:
    q, k, v = qkv(2, 2, 4, 2, 300, 32)
    v = v * torch.nan
    for mask in (
        torch.zeros(1, 1, 1, 300, dtype=torch.bool),
        torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        torch.full((2, 8, 2, 300), -INF),
    ):
        assert kernels.attention(q, k, v, mask, 0.2).eq(0).all()
    q, k, v = qkv(2, 2, 4, 2, 300, 32)
    shown = torch.ones(2, 1, 2, 300, dtype=torch.bool)
    shown[1, 0, 0] = False
    found = check(q, k, v, shown)
    assert found[1, 0].eq(0).all() and found[1, 1].ne(0).any()
    assert check(q, k[:, :, :0], v[:, :, :0]).eq(0).all()


# Positions and threads


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bits(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    cases: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]] = [
        (qkv(1, 4, 8, 1, 5000, 128, torch.bfloat16), None),
        (qkv(2, 2, 3, 2, 3000, 64), numbers(2, 1, 2, 3000) > -1),
        (qkv(1, 2, 1, 1, 4096, 128), torch.arange(4096)[None, None, None] > 700),
    ]
    try:
        for inputs, mask in cases:
            torch.set_num_threads(1)
            alone = kernels.attention(*inputs, mask, 0.1)
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(kernels.attention(*inputs, mask, 0.1), alone)
    finally:
        torch.set_num_threads(before)


def test_room_behind_the_tokens_changes_no_bit(isa: str) -> None:
    q, k, v = qkv(1, 2, 4, 1, 700, 64, torch.bfloat16)
    few = kernels.attention(q, k[:, :, :333], v[:, :, :333], None, 0.1)
    mask = (torch.arange(700) < 333)[None, None, None]
    assert torch.equal(kernels.attention(q, k, v, mask, 0.1), few)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_positions(isa: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 2, 8, 1, 5000, 128, dtype)
    check(q, k, v, scale=128**-0.5)
    mask = (torch.arange(5000) > 1234)[None, None, None]
    check(q, k, v, mask, scale=128**-0.5)


def test_many_tokens(isa: str, called: list[str]) -> None:
    for tokens in (2, 5, MOST_TOKENS):
        q, k, v = qkv(1, 2, 3, tokens, 300, 32)
        causal = torch.ones(tokens, 300, dtype=torch.bool).tril(300 - tokens)[None, None]
        check(q, k, v, causal)
        check(q, k, v)
    assert len(called) == 6


# What the kernel does not take


def test_other_calls_are_left_to_the_reference(isa: str, called: list[str]) -> None:
    for q, k, v, mask in (
        (*(x.double() for x in qkv(1, 2, 2, 1, 20, 32)), None),
        (*qkv(1, 2, 2, 1, 20, MOST_SIZE + 1), None),
        (*qkv(1, 2, 2, MOST_TOKENS + 1, 20, 8), None),
        (*qkv(1, 2, 2, 1, 20, 8), torch.zeros(1, 1, 1, 20, dtype=torch.float64)),
    ):
        assert not takes(q, k, v, mask)
        found = kernels.attention(q, k, v, mask, 0.3)
        assert torch.equal(found, reference.attention(q, k, v, mask, 0.3))
    assert not called


def test_nothing_to_compute(isa: str) -> None:
    for shape in ((0, 2, 2, 1, 5, 8), (1, 2, 0, 1, 5, 8), (1, 2, 2, 0, 5, 8), (1, 2, 2, 1, 5, 0)):
        q, k, v = qkv(*shape)
        assert kernels.attention(q, k, v, None, 1.0).shape == (
            q.shape[0],
            q.shape[2],
            *q.shape[1::2],
        )


def test_the_library_checks_sizes(isa: str) -> None:
    def arguments(**changed: int) -> list[int | float | None]:
        sizes = {
            "mask_numbers": 3, "batches": 1, "query_heads": 4, "heads": 2, "tokens": 1,
            "positions": 5, "size": 8, "numbers": 0, "threads": 1,
        } | changed  # fmt: skip
        q = k = v = y = numbers(4 * 5 * 8)
        kept.extend((q, y))
        return [
            q.data_ptr(), 32, 8, 8, k.data_ptr(), 80, 40, 8, v.data_ptr(), 80, 40, 8,
            None, sizes["mask_numbers"], 0, 0, 0, 0, sizes["batches"], sizes["query_heads"],
            sizes["heads"], sizes["tokens"], sizes["positions"], sizes["size"], 1.0,
            sizes["numbers"], sizes["threads"], y.data_ptr(),
        ]  # fmt: skip

    kept: list[Tensor] = []
    interface.call("moepress_attention", *arguments())
    for wrong in (
        {"numbers": 3}, {"numbers": -1}, {"mask_numbers": 4}, {"mask_numbers": -1}, {"batches": -1},
        {"heads": 0}, {"heads": 3}, {"heads": -2}, {"tokens": -1}, {"tokens": 2**40},
        {"positions": -1}, {"positions": 2**31}, {"size": 0}, {"size": 513}, {"threads": 0},
        {"batches": 2**29, "query_heads": 2**29},
    ):  # fmt: skip
        with pytest.raises(InputError, match="moepress_attention: a size is out of range"):
            interface.call("moepress_attention", *arguments(**wrong))


def test_inputs_that_do_not_fit(isa: str) -> None:
    q, k, v = qkv(1, 2, 2, 1, 20, 8)
    for wrong in ((q[:, :3], k, v), (q, k, v[:, :, :9]), (q.half(), k, v), (q[..., :4], k, v)):
        with pytest.raises(InputError, match="Expected q"):
            kernels.attention(*wrong, None, 1.0)
    with pytest.raises(InputError, match="mask must be broadcastable"):
        kernels.attention(q, k, v, torch.ones(1, 1, 1, 9, dtype=torch.bool), 1.0)


def test_one_tensor_and_one_call(isa: str, called: list[str]) -> None:
    """Nothing else of torch runs: in a step of one token it would take longer than the kernel."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            ops.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = qkv(1, 2, 4, 1, 64, 32, torch.bfloat16)
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    ops: list[str] = []
    with Seen():
        kernel(q, k, v, mask, 1.0)
    assert ops == ["aten.empty.memory_format"] and called == ["moepress_attention"]
