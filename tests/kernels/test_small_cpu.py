"""The small operations of decoding in C++, on every instruction set, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.kernels import cpu
from moepress.kernels import small_reference as reference
from moepress.kernels.small_reference import FORMULAS, STYLES
from tests.kernels.heads import drawn_heads

MISSING = cpu.missing()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5


# Norms

ROWS = {  # rows, numbers of a row
    "hidden states": (1, 2048),
    "heads": (32, 128),
    "more than are floats at a time": (2, 5000),
    "odd": (3, 13),
    "one number": (2, 1),
    "odd, more than 32": (2, 1101),
}


def near(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> Tensor:
    """Equal but for the order of sums: few numbers are rounded to a neighbour."""
    found, expected = (f(x, weight, eps, formula) for f in (cpu.rms_norm, reference.rms_norm))
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.is_contiguous()
    if x.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
        return found
    torch.testing.assert_close(found, expected, rtol=torch.finfo(x.dtype).eps, atol=0)
    apart = (found.float() - expected.float()).abs() > 2e-6 * expected.float().abs()
    assert apart.float().mean() < 0.003
    return found


def drawn_rows(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of other sizes, and a weight."""
    torch.manual_seed(0)
    rows, size = ROWS[name]
    x = (torch.randn(rows, size) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    return x, 1 + torch.randn(size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_norms(isa: str, name: str, dtype: torch.dtype, called: list[str]) -> None:
    x, weight = drawn_rows(name, dtype)
    near(x, None, EPS, "wide")
    for weight_dtype in DTYPES:
        for formula in FORMULAS:
            near(x, weight.to(weight_dtype), EPS, formula)
    assert called == ["moepress_rms_norm"] * 10


def test_formulas_differ(isa: str) -> None:
    """The rounding of the normed numbers shows: else `near` would prove nothing about it."""
    x, weight = torch.randn(1, 4096).bfloat16(), (1 + torch.randn(4096)).bfloat16()
    rounded, wide = (cpu.rms_norm(x, weight, EPS, f) for f in FORMULAS[:2])
    assert (rounded != wide).float().mean() > 0.05


def normed_in_order(x: Tensor, eps: float) -> Tensor:
    """Rows of floats, normed with the sums of rms_norm.h; NumPy rounds every step as C++ does."""
    rows, size = x.shape
    padded = np.pad(x.numpy(), ((0, 0), (0, -size % 32))).reshape(rows, -1, 32)
    sums = np.zeros((rows, 32), np.float32)
    for i in range(padded.shape[1]):
        sums = sums + padded[:, i] ** 2
    while sums.shape[1] > 1:
        first, second = np.split(sums, 2, 1)
        sums = first + second
    inverse = np.float32(1) / np.sqrt(sums / np.float32(size) + np.float32(eps))
    return x * torch.from_numpy(inverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_the_order_of_sums_is_the_same_everywhere(isa: str, name: str, dtype: torch.dtype) -> None:
    x, weight = drawn_rows(name, dtype)
    normed = normed_in_order(x.float(), EPS)
    assert torch.equal(cpu.rms_norm(x, None, EPS, "wide"), normed.to(dtype))
    assert torch.equal(cpu.rms_norm(x, weight, EPS, "wide"), (normed * weight).to(dtype))
    alone = cpu.rms_norm(x[-1:], None, EPS, "wide")
    assert torch.equal(alone, cpu.rms_norm(x, None, EPS, "wide")[-1:])


def test_many_rows_on_threads(isa: str) -> None:
    x, before = torch.randn(700, 300), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(near(x, None, EPS, "wide"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_apart_and_odd_addresses(isa: str, called: list[str]) -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(4, 200).bfloat16(), torch.randn(128).bfloat16()
    heads = torch.randn(2, 5, 3, 2, 128).bfloat16()
    given = (
        wide[:, :128], wide[:, 3:131], wide[::2, 8:136], wide[:3, :128].view(3, 1, 128),
        wide[0, :128],
        heads[:, :, :, 1],  # queries beside gates
        heads[:, 1:3, :, 0],  # two levels of rows
        heads[:, :1, :, 0].transpose(1, 2),  # heads before the one token
        wide[:, None, :128].expand(4, 3, 128),
    )  # fmt: skip
    for x in given:
        near(x, weight, EPS, "rounded")
    more = (
        torch.randn(128, 5).T,  # numbers of a row apart
        heads[:, 1:3, 1:, 0].transpose(0, 2),  # three levels of rows
    )
    for x in more:
        near(x, None, EPS, "wide")
    near(wide[:, :128], torch.randn(129).bfloat16()[1:], EPS, "wide")
    near(wide[:, :128], torch.randn(256).bfloat16()[::2], EPS, "wide")
    assert called == ["moepress_rms_norm"] * (len(given) + len(more) + 2)


def test_the_epsilon_and_empty_rows(isa: str) -> None:
    x = torch.full((2, 64), 1e-3)
    found = cpu.rms_norm(x, None, 3e-6, "wide")
    torch.testing.assert_close(found, torch.full((2, 64), 0.5), rtol=1e-6, atol=0)
    assert cpu.rms_norm(x[:0], None, EPS, "wide").shape == (0, 64)
    assert cpu.rms_norm(x[:, :0], x[0, :0], EPS, "wide").shape == (2, 0)
    assert not cpu.rms_norm(torch.zeros(1, 64), None, EPS, "wide").any()


def test_rows_that_are_not_finite(isa: str) -> None:
    x = torch.randn(4, 40)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for dtype in DTYPES:
        for formula in FORMULAS:
            args = x.to(dtype), torch.randn(40).to(dtype), EPS, formula
            found, expected = cpu.rms_norm(*args), reference.rms_norm(*args)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found[::3].isfinite(), torch.ones(2, 40, dtype=torch.bool))


# Sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_torch(isa: str, dtype: torch.dtype, called: list[str]) -> None:
    torch.manual_seed(0)
    exact = torch.finfo(dtype)
    odd = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, exact.max, -exact.max, exact.tiny, 1e-7]
    for size in (1, 7, 2048, 2049):
        a = torch.randn(1, size).mul_(torch.logspace(-3, 3, size)).to(dtype)
        b = torch.randn(1, size).to(dtype)
        out = torch.empty_like(a)
        assert cpu.add_into(a, b, out)
        assert torch.equal(out, a + b)
    pairs = torch.cartesian_prod(*[torch.tensor(odd, dtype=dtype)] * 2).T.contiguous()
    out = torch.empty_like(pairs[0])
    assert cpu.add_into(pairs[0], pairs[1], out)
    assert torch.equal(out.nan_to_num(7), (pairs[0] + pairs[1]).nan_to_num(7))
    assert cpu.add_into(pairs[0], pairs[1], pairs[0])  # in place
    assert torch.equal(out.nan_to_num(7), pairs[0].nan_to_num(7))
    assert called == ["moepress_add"] * 6


def test_sums_that_are_left_to_torch() -> None:
    x = torch.zeros(4, 4)
    for a, b in (
        (x, x[0]), (x, x.T), (x.T, x), (x, x.bfloat16()), (x.double(), x.double()),
        (x.long(), x.long()), (torch.zeros(1 << 17), torch.zeros(1 << 17)),
    ):  # fmt: skip
        assert not cpu.add_into(a, b, torch.empty_like(a))
    assert not cpu.add_into(x, x, torch.empty(4, 8)[:, ::2])


# Rotary embeddings

HEADS = {  # batches, heads of queries, heads of keys, tokens, size, columns
    "one token": (1, 32, 4, 1, 128, 128),
    "several": (2, 3, 3, 4, 64, 64),
    "a part of the numbers": (2, 4, 1, 2, 80, 32),
    "none of the numbers": (1, 2, 1, 2, 8, 0),
    "odd": (2, 1, 2, 3, 45, 22),
    "no keys": (1, 4, 0, 1, 16, 16),
    "no queries": (1, 0, 4, 1, 16, 16),
    "great": (1, 2, 1, 1, 640, 640),
}


def drawn(name: str, dtype: torch.dtype, angles: torch.dtype) -> tuple[Tensor, ...]:
    return drawn_heads(HEADS[name], dtype, angles)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


def turned_alike(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str, wide: bool
) -> tuple[Tensor, Tensor]:
    found = cpu.rotary(q, k, cos, sin, style, wide)
    same(found, reference.rotary(q, k, cos, sin, style, wide))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", HEADS)
def test_rotary_embeddings(
    isa: str, name: str, style: str, dtype: torch.dtype, called: list[str]
) -> None:
    kinds = [(False, dtype), *((True, angles) for angles in DTYPES)]
    for wide, angles in kinds:
        q, k, cos, sin = drawn(name, dtype, angles)
        if STYLES[style].doubled:
            cos, sin = (a[..., : min(cos.shape[-1], q.shape[-1] // 2)] for a in (cos, sin))
        turned_alike(q, k, cos, sin, style, wide)
        turned_alike(q, k, cos[:1], sin[:1], style, wide)  # for all batches
    assert called == ["moepress_rotary"] * 2 * len(kinds)


def test_results_of_styles_and_roundings_differ(isa: str) -> None:
    """Else equal ones would prove nothing about them."""
    q, k, cos, sin = drawn("several", torch.bfloat16, torch.bfloat16)
    half = cos[..., :32], sin[..., :32]
    found = [
        cpu.rotary(q, k, *(half if STYLES[style].doubled else (cos, sin)), style, wide)[0]
        for style in STYLES
        for wide in (False, True)
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_heads(isa: str, dtype: torch.dtype, called: list[str]) -> None:
    """Tokens before heads, parts of one tensor, addresses that are odd, heads that are columns."""
    q, k, cos, sin = drawn("several", dtype, dtype)

    def part(x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    def misplaced(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)

    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), part, misplaced,
        lambda x: x[:1, :1].expand(x.shape),
    )  # fmt: skip
    for change in changes:
        turned_alike(change(q), change(k), cos, sin, "halves", False)
        turned_alike(q, change(k), part(cos), misplaced(sin), "neighbours", False)
    turned_alike(q, k, cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1), "halves", False)
    assert called == ["moepress_rotary"] * 9
    columns = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
    turned_alike(*columns, cos, sin, "halves", False)  # by the reference


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_number_of_16_bits(isa: str, dtype: torch.dtype, wide: bool) -> None:
    """All patterns of bits, turned by numbers that are great and small, subnormal or not finite."""
    torch.manual_seed(0)
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    q = torch.stack([every, every.flip(0), every.roll(9999)]).view(dtype)[None, :, None]
    if wide:
        angles = torch.randn(2, 1, 1, 1 << 16) * 2.0 ** torch.randint(-20, 20, (2, 1, 1, 1 << 16))
    else:
        angles = every[torch.randperm(1 << 16)].repeat(2).view(dtype).view(2, 1, 1, -1)
    args = q, q[:, :0], *angles, "halves", wide
    found, expected = cpu.rotary(*args)[0], reference.rotary(*args)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert 0.01 < found.isfinite().float().mean() < 0.9999
    zero = found == 0
    assert torch.equal(found.signbit()[zero], expected.signbit()[zero])


def test_many_tokens_on_threads(isa: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 65, 8, 128).transpose(1, 2), torch.randn(2, 2, 65, 128)
    cos, sin = torch.randn(2, 2, 65, 128)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            turned_alike(q, k, cos, sin, "halves", False)
    finally:
        torch.set_num_threads(before)


def test_nothing_to_turn(isa: str) -> None:
    q, k, cos, sin = drawn("several", torch.float32, torch.float32)
    turned_alike(q[:0], k[:0], cos[:0], sin[:0], "halves", False)
    turned_alike(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0], "halves", False)
    turned_alike(q[:, :0], k[:, :0], cos, sin, "halves", False)


# Caches

WRITES = {  # batches, heads, room, size of keys, of values
    "one sequence": (1, 4, 20, 128, 128),
    "other values": (3, 2, 9, 64, 32),
    "odd": (2, 3, 5, 5, 3),
    "no values": (2, 3, 5, 5, 0),
    "great": (2, 64, 3, 640, 640),
}
OF_CACHES = (*DTYPES, torch.float64, torch.int8, torch.bool, torch.complex128)


def caches(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    batches, heads, room, size, of_values = WRITES[name]
    keys, values = ((9 * torch.randn(batches, heads, room, n)).to(dtype) for n in (size, of_values))
    # as attention makes them
    key, value = (
        (9 * torch.randn(batches, 1, heads, n)).to(dtype).transpose(1, 2) for n in (size, of_values)
    )
    return keys, values, key, value


@pytest.mark.parametrize("dtype", OF_CACHES, ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_a_token_is_written(isa: str, name: str, dtype: torch.dtype, called: list[str]) -> None:
    keys, values, key, value = caches(name, dtype)
    expected = keys.clone(), values.clone()
    room = keys.shape[2]
    for position in map(torch.tensor, (1, [room - 1], 0)):
        cpu.cache_write(keys, values, key, value, position)
        reference.cache_write(*expected, key, value, position)
        key, value = key.flip(1), value.flip(1)
    for found, right in zip((keys, values), expected, strict=True):
        assert torch.equal(found, right)
    assert called == ["moepress_cache_write"] * 3


def test_keys_and_values_of_other_dtypes(isa: str) -> None:
    keys, _, key, _ = caches("other values", torch.float64)
    _, values, _, value = caches("other values", torch.float16)
    before = keys.clone(), values.clone()
    cpu.cache_write(keys, values, key, value, torch.tensor(4))
    for found, one, old in zip((keys, values), (key, value), before, strict=True):
        assert torch.equal(found[:, :, 4:5], one)
        rest = [i for i in range(9) if i != 4]
        assert torch.equal(found[:, :, rest], old[:, :, rest])


def test_caches_that_are_parts(isa: str, called: list[str]) -> None:
    """Strides, odd addresses, one token for all heads, numbers that do not follow each other."""
    keys, values, key, value = caches("one sequence", torch.bfloat16)

    def within(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3).to(x.dtype)
        wide[..., 1:, 3:] = x
        return wide[..., 1:, 3:]

    turned = key.transpose(1, 3).contiguous().transpose(1, 3)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    for held, given in (
        ((within(keys), within(values)), key),
        (tokens_first, key),
        ((keys, values), key[:, :1].expand(-1, 4, -1, -1)),
        ((keys, values), turned),
    ):
        before = held[0].clone()
        cpu.cache_write(*held, given, value, torch.tensor([2]))
        assert torch.equal(held[0][:, :, 2:3], given) and torch.equal(held[1][:, :, 2:3], value)
        rest = [i for i in range(20) if i != 2]
        assert torch.equal(held[0][:, :, rest], before[:, :, rest])
    assert called == ["moepress_cache_write"] * 3  # the last one by the reference


@pytest.mark.parametrize("position", [-1, 20, 1 << 62, -(1 << 63)])
def test_no_room(isa: str, position: int) -> None:
    keys, values, key, value = caches("one sequence", torch.float32)
    before = keys.clone(), values.clone()
    with pytest.raises(InputError, match="outside of the room"):
        cpu.cache_write(keys, values, key, value, torch.tensor(position))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])
