"""Attention of few tokens, emulated, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels import reference
from moepress.kernels.cuda.attention import attention, splits_of
from tests.kernels.cuda import emulate

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = {  # batches, query heads, key heads, tokens, positions, size
    "one position": (1, 4, 4, 1, 1, 64),
    "group of 4": (2, 8, 2, 1, 100, 128),
    "group of 8, many splits": (1, 8, 1, 1, 1000, 64),
    "group of 12": (1, 12, 1, 1, 70, 128),
    "group of 16, two blocks of rows": (1, 16, 1, 1, 65, 192),
    "group of 24, a part of a block": (1, 48, 2, 1, 33, 64),
    "four tokens": (2, 6, 2, 4, 130, 96),
    "odd size": (1, 4, 2, 3, 17, 40),
    "wide": (1, 4, 1, 1, 200, 256),
    "more tiles than are looked at together": (16, 1, 1, 1, 1300, 8),
}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    batches, queries, heads, tokens, positions, size = shape
    q = torch.randn(batches, queries, tokens, size)
    k, v = (torch.randn(batches, heads, positions, size) for _ in "kv")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Each query sees the first key at least."""
    batches, queries, _, tokens, positions, _ = shape
    torch.manual_seed(1)

    def seen(*sizes: int) -> Tensor:
        mask = torch.rand(*sizes) < 0.5
        mask[..., 0] = True
        return mask

    left = torch.arange(positions) >= torch.arange(batches).view(-1, 1, 1, 1) % positions
    first = torch.arange(positions).expand(1, 1, 1, -1) < max(1, positions // 5)
    added = torch.randn(batches, queries, tokens, positions).to(dtype)
    least = torch.finfo(dtype).min
    return {
        "none": None,
        "left padding": left,
        "the first of a static cache": first,
        "of heads": seen(batches, queries, tokens, positions),
        "of tokens": seen(1, 1, tokens, positions),
        "one for all": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "added": added.masked_fill(~seen(1, 1, tokens, positions), -torch.inf),
        "added to all heads": added[:, :1, :1].masked_fill(~seen(batches, 1, 1, positions), least),
        "the least to all": torch.full((1, 1, 1, positions), least, dtype=dtype),
    }


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    """At most twice the error of plain PyTorch that has the same inputs and float32 between."""
    exact = reference.attention(q.double(), k.double(), v.double(), mask, scale)
    found = attention(q, k, v, mask, scale)
    plain = reference.attention(q, k, v, mask, scale)
    assert found.dtype == q.dtype and found.shape == exact.shape and found.is_contiguous()
    errors = [(y.double() - exact).abs().max() for y in (found, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_masks(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    q, k, v = inputs(shape, dtype)
    for number, mask in enumerate(masks(shape, dtype).values()):
        check(q, k, v, mask, (0.3, shape[-1] ** -0.5)[number % 2])


def test_the_oracle_is_what_torch_computes() -> None:
    shape = SHAPES["four tokens"]
    q, k, v = inputs(shape, torch.float64)
    for mask in masks(shape, torch.float64).values():
        found = reference.attention(q, k, v, mask, 0.2)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True
        )
        torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_caches(dtype: torch.dtype) -> None:
    """Positions before heads, room behind them, parts of one tensor, and addresses that are odd."""
    q, k, v = inputs((2, 4, 2, 1, 50, 64), dtype)
    mask = masks((2, 4, 2, 1, 50, 64), dtype)["of heads"]
    expected = attention(q, k, v, mask, 0.1)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def with_room(x: Tensor) -> Tensor:
        room = torch.full((*x.shape[:2], 99, x.shape[3]), torch.nan, dtype=dtype)
        room[:, :, : x.shape[2]] = x
        return room[:, :, : x.shape[2]]

    def half(x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    def misplaced(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)

    def backwards(x: Tensor) -> Tensor:
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for change in (turned, with_room, half, misplaced, backwards):
        assert torch.equal(attention(q, change(k), change(v), mask, 0.1), expected)
    assert torch.equal(attention(turned(q), k, v, mask, 0.1), expected)
    wide = mask.new_zeros(2, 4, 1, 77)
    wide[..., :50] = mask
    assert torch.equal(attention(q, k, v, wide[..., :50], 0.1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing_gets_zeros(dtype: torch.dtype) -> None:
    q, k, v = inputs((2, 4, 2, 1, 300, 64), dtype)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1] = False
    for given in (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)):
        found = attention(q, k, v, given, 0.1)
        assert not found[1].any()
        torch.testing.assert_close(found[:1], attention(q[:1], k[:1], v[:1], None, 0.1))
        assert not torch.nn.functional.scaled_dot_product_attention(
            q[1:], k[1:], v[1:], attn_mask=given[1:], enable_gqa=True
        ).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_great_scores(dtype: torch.dtype) -> None:
    """The greatest score grows from tile to tile; weights of those before underflow."""
    q, k, v = inputs((1, 2, 1, 1, 400, 64), dtype)
    k = k * torch.linspace(0, 3, 400)[:, None].to(dtype)
    check(q, k, v, None, 5.0)
    check(q, -k.flip(2), v, None, 5.0)


def test_splits_fill_a_card() -> None:
    most = 3 * 132
    assert splits_of(8, 512, most) == 8  # 64 blocks
    assert 300 < 8 * splits_of(8, 32768, most) <= most
    assert splits_of(1, 1 << 20, most) <= 128
    assert splits_of(1000, 4096, most) == 1
    for positions in range(1, 3000, 61):
        assert 1 <= splits_of(1, positions, most) <= -(-positions // 64)


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    for shape, dtype in (
        ((1, 2, 1, 1, 5, 12), torch.float32),
        ((1, 2, 1, 1, 5, 16), torch.float64),
    ):
        q, k, v = inputs(shape, dtype)
        assert torch.equal(attention(q, k, v, None, 1.0), reference.attention(q, k, v, None, 1.0))


def test_empty_inputs() -> None:
    q, k, v = inputs((0, 4, 2, 1, 5, 64), torch.float32)
    assert attention(q, k, v, None, 1.0).shape == (0, 1, 4, 64)
    q, k, v = inputs((1, 4, 2, 1, 0, 64), torch.float32)
    assert not attention(q, k, v, None, 1.0).any()


def test_the_op() -> None:
    q, k, v = inputs((2, 4, 2, 1, 9, 16), torch.float32)
    mask = torch.rand(2, 1, 1, 9) < 0.7
    torch.library.opcheck(kernels.attention.op, (q, k, v, mask, 0.2))
    expected = reference.attention(q, k, v, mask, 0.2)
    with kernels.only("reference"):
        assert torch.equal(kernels.attention(q, k, v, mask, 0.2), expected)
    for wrong in (
        (q, k[:, :, :5], v, mask),
        (q, k.double(), v, mask),
        (q[:, :3], k, v, mask),
        (q, k, v, mask[..., :5]),
        (q, k, v, mask[0]),
    ):
        with pytest.raises(InputError):
            kernels.attention(*wrong, 0.2)
