"""The small operations of decoding, emulated, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels import small_reference as reference
from moepress.kernels.cuda import launch
from moepress.kernels.cuda.small import MOST_UNITS, cache_write, rms_norm, rotary
from moepress.kernels.small_reference import FORMULAS, STYLES
from tests.kernels.cuda import emulate
from tests.kernels.heads import drawn_heads

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that run."""
    names: list[str] = []

    def run(kernel: str, *given: object) -> None:
        names.append(kernel)
        emulate.launch(kernel, *given)  # type: ignore[arg-type]

    monkeypatch.setitem(launch.LAUNCHERS, "cpu", lambda device: launch.Launcher(run, 8))
    yield names


# Norms

ROWS = {  # rows, numbers of a row
    "hidden states": (1, 4096),
    "heads": (32, 128),
    "more than registers hold": (2, 9000),
    "odd": (3, 13),
    "one number": (2, 1),
    "odd, more than registers hold": (2, 1101),
}


def near(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> None:
    """Equal but for the order of sums: few numbers are rounded to a neighbour."""
    found, expected = (f(x, weight, eps, formula) for f in (rms_norm, reference.rms_norm))
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.is_contiguous()
    if x.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
        return
    torch.testing.assert_close(found, expected, rtol=torch.finfo(x.dtype).eps, atol=0)
    apart = (found.float() - expected.float()).abs() > 2e-6 * expected.float().abs()
    assert apart.float().mean() < 0.003


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_norms(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    torch.manual_seed(0)
    rows, size = ROWS[name]
    x = (torch.randn(rows, size) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    near(x, None, EPS, "wide")
    for weight_dtype in {dtype, torch.float32}:
        weight = (1 + torch.randn(size)).to(weight_dtype)
        for formula in FORMULAS:
            near(x, weight, EPS, formula)
    assert set(launched) == {"moepress_rms_norm"}


def test_formulas_differ() -> None:
    """The rounding of the normed numbers shows: else `near` would prove nothing about it."""
    x, weight = torch.randn(1, 4096).bfloat16(), (1 + torch.randn(4096)).bfloat16()
    rounded, wide = (rms_norm(x, weight, EPS, f) for f in FORMULAS[:2])
    assert (rounded != wide).float().mean() > 0.05


def test_rows_apart_and_odd_addresses() -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(4, 200).bfloat16(), torch.randn(128).bfloat16()
    for x in (wide[:, :128], wide[:, 3:131], wide[::2, 8:136], wide[:3, :128].view(3, 1, 128)):
        near(x, weight, EPS, "rounded")
    turned = torch.randn(128, 5).T
    near(turned, None, EPS, "wide")
    misplaced = torch.randn(129).bfloat16()[1:]
    x = wide[:, :128]
    near(x, misplaced, EPS, "wide")


def test_the_epsilon_and_empty_inputs() -> None:
    x = torch.full((2, 64), 1e-3)
    assert torch.allclose(rms_norm(x, None, 3e-6, "wide"), torch.full((2, 64), 0.5))
    assert rms_norm(x[:0], None, EPS, "wide").shape == (0, 64)
    assert not rms_norm(torch.zeros(1, 64), None, EPS, "wide").any()


# Rotary embeddings

HEADS = {  # batches, heads of queries, heads of keys, tokens, size, columns
    "one token": (1, 8, 2, 1, 128, 128),
    "several": (2, 3, 3, 4, 64, 64),
    "a part of the numbers": (2, 4, 1, 2, 80, 32),
    "no keys": (1, 4, 0, 1, 16, 16),
    "great": (1, 2, 1, 1, 640, 640),
}


def drawn(name: str, dtype: torch.dtype, angles: torch.dtype) -> tuple[Tensor, ...]:
    return drawn_heads(HEADS[name], dtype, angles)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", HEADS)
def test_rotary_embeddings(name: str, style: str, dtype: torch.dtype, launched: list[str]) -> None:
    for wide, angles in ((False, dtype), (True, dtype), (True, torch.float32)):
        q, k, cos, sin = drawn(name, dtype, angles)
        if STYLES[style].doubled:
            cos, sin = (a[..., : min(cos.shape[-1], q.shape[-1] // 2)] for a in (cos, sin))
        same(rotary(q, k, cos, sin, style, wide), reference.rotary(q, k, cos, sin, style, wide))
        one = cos[:1], sin[:1]  # for all batches
        same(rotary(q, k, *one, style, wide), reference.rotary(q, k, *one, style, wide))
    assert set(launched) == {"moepress_rotary"}


def test_the_oracle_is_what_transformers_computes() -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    from transformers.models.mixtral import modeling_mixtral as mixtral

    q, k, cos, sin = drawn("several", torch.bfloat16, torch.bfloat16)
    half = cos[..., :32], sin[..., :32]
    for (c, s), style, wide, theirs in (
        ((cos, sin), "halves", False, mixtral.apply_rotary_pos_emb),
        (half, "halves_of_pairs", False, gpt_oss.apply_rotary_pos_emb),
        ((cos, sin), "neighbours_to_halves", False, deepseek.apply_rotary_pos_emb_interleave),
        ((cos, sin), "neighbours_of_pairs", True, ernie.apply_rotary_pos_emb),
    ):
        same(reference.rotary(q, k, c, s, style, wide), theirs(q, k, c, s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_heads(dtype: torch.dtype) -> None:
    """Tokens before heads, parts of one tensor, addresses that are odd, heads that are columns."""
    q, k, cos, sin = drawn("several", dtype, dtype)
    expected = reference.rotary(q, k, cos, sin, "halves", False)

    def part(x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    def misplaced(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)

    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), part, misplaced,
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    )  # fmt: skip
    for change in changes:
        found = rotary(change(q), change(k), cos, sin, "halves", False)
        same(found, expected)
        like = torch.empty_like(change(q))
        assert found[0].stride() == like.stride()
        same(rotary(q, change(k), part(cos), misplaced(sin), "halves", False), expected)


# Caches

WRITES = {  # batches, heads, room, size of keys, of values
    "one sequence": (1, 8, 20, 128, 128),
    "other values": (3, 2, 9, 64, 32),
    "odd": (2, 3, 5, 5, 3),
    "great": (1, 32, 4, 192, 128),
    "greater than a block writes": (2, 64, 3, 640, 640),
}


def caches(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    batches, heads, room, size, of_values = WRITES[name]
    keys, values = (torch.randn(batches, heads, room, n).to(dtype) for n in (size, of_values))
    # as attention makes them
    key, value = (
        torch.randn(batches, 1, heads, n).to(dtype).transpose(1, 2) for n in (size, of_values)
    )
    return keys, values, key, value


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_a_token_is_written(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    keys, values, key, value = caches(name, dtype)
    expected = keys.clone(), values.clone()
    for position in map(torch.tensor, (1, 2)):
        cache_write(keys, values, key, value, position)
        reference.cache_write(*expected, key, value, position)
        key, value = key + 1, value + 1
    for found, right in zip((keys, values), expected, strict=True):
        assert torch.equal(found, right)
    batches, heads, _, size, of_values = WRITES[name]
    pieces = batches * heads * (size + of_values) * keys.element_size() // 16
    assert set(launched) == (set() if pieces > MOST_UNITS else {"moepress_cache_write"})


def test_caches_that_are_parts(launched: list[str]) -> None:
    """Strides, addresses that are odd, and a token whose numbers do not follow each other."""
    keys, values, key, value = caches("one sequence", torch.bfloat16)

    def within(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3).to(x.dtype)
        wide[..., 1:, 3:] = x
        return wide[..., 1:, 3:]

    turned = key.transpose(1, 3).contiguous().transpose(1, 3)
    for held, given in (((within(keys), within(values)), key), ((keys, values), turned)):
        before = held[0].clone()
        cache_write(*held, given, value, torch.tensor([0]))
        assert torch.equal(held[0][:, :, :1], key) and torch.equal(held[1][:, :, :1], value)
        assert torch.equal(held[0][:, :, 1:], before[:, :, 1:])
    assert launched == ["moepress_cache_write"] * 2


@pytest.mark.parametrize("position", [-1, 20])
def test_no_room(position: int) -> None:
    given = caches("one sequence", torch.float32)
    with pytest.raises(emulate.EmulationError, match="outside of the room"):
        cache_write(*given, torch.tensor(position))


# The ops


def test_the_ops() -> None:
    """Their schemas and fakes; gradients are not theirs."""
    x, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(16)
    for formula in FORMULAS:
        for given in (weight, weight.bfloat16(), None):
            torch.library.opcheck(kernels.rms_norm.op, (x, given, EPS, formula))
            expected = reference.rms_norm(x, given, EPS, formula)
            assert torch.equal(kernels.rms_norm(x, given, EPS, formula), expected)
    q, k, cos, sin = drawn("a part of the numbers", torch.float32, torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    for style in ("halves", "neighbours_to_halves"):
        torch.library.opcheck(kernels.rotary.op, (q, k, cos, sin, style, True))
        expected = reference.rotary(q, k, cos, sin, style, True)
        same(kernels.rotary(q, k, cos, sin, style, True), expected)
    given = *caches("odd", torch.float32), torch.tensor(1)
    torch.library.opcheck(kernels.cache_write.op, given)
    kernels.cache_write(*given)
    assert torch.equal(given[0][:, :, 1:2], given[2])


def test_what_does_not_fit() -> None:
    x, weight = torch.randn(2, 16), torch.randn(16)
    for given in (
        (x, weight[:8], EPS, "wide"),
        (x, weight, EPS, "other"),
        (x.int(), weight, EPS, "wide"),
    ):
        with pytest.raises(InputError):
            kernels.rms_norm(*given)
    q, k, cos, sin = drawn("several", torch.float32, torch.float32)
    for wrong in (
        (q, k[:, :, :2], cos, sin, "halves", False),
        (q, k.double(), cos, sin, "halves", False),
        (q, k, cos.double(), sin.double(), "halves", False),
        (q, k, cos, sin[..., :8], "halves", False),
        (q, k, cos, sin, "halves_of_pairs", False),
        (q, k, cos[..., :7], sin[..., :7], "halves", False),
        (q, k, cos, sin, "other", False),
    ):
        with pytest.raises(InputError):
            kernels.rotary(*wrong)
    keys, values, key, value = caches("one sequence", torch.float32)
    position = torch.tensor(0)
    for bad in (
        (keys, values, key[:, :4], value, position),
        (keys, values, key.double(), value, position),
        (keys, values, key.expand(-1, -1, 2, -1), value, position),
        (keys, values[:, :, :5], key, value, position),
        (keys, values, key, value, position.int()),
        (keys, values, key, value, torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(InputError):
            kernels.cache_write(*bad)


def test_other_dtypes_go_to_the_reference(launched: list[str]) -> None:
    x = torch.randn(2, 16).double()
    assert torch.equal(rms_norm(x, None, EPS, "wide"), reference.rms_norm(x, None, EPS, "wide"))
    q, k, cos, sin = drawn("several", torch.float64, torch.float64)
    expected = reference.rotary(q, k, cos, sin, "halves", False)
    same(rotary(q, k, cos, sin, "halves", False), expected)
    assert not launched
