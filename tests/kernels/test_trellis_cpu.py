"""The C++ kernels of trellis codes on every instruction set of this machine, against an oracle."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import TRELLIS_BITS, Codec, PackedSpec
from moepress.kernels import cpu, reference, trellis
from moepress.kernels.experts_call import ExpertsCall
from moepress.rounding.fit import add_in_order
from moepress.rounding.noise import plain_rows
from moepress.rounding.rotation import rotate, rotate_back
from tests.kernels.test_kernels import op_arguments, within_twice_plain
from tests.rounding.test_trellis import codec_of, random_packed

MISSING = cpu.missing()
MANY_TOKENS = 8  # from so many on some kernels take weights as one byte each (trellis_bytes.h)
SUMS_WORDS = {"avx2", "portable"}  # instruction sets that do not


def values_of(isa: str, activation_bits: int, tokens: int) -> trellis.Values:
    """The values that products of so many tokens take."""
    if activation_bits == 16:
        return "exact"
    if tokens < MANY_TOKENS:
        return "averages"
    return "exact" if isa in SUMS_WORDS else "bytes"


def product_in_integers(
    x: Tensor,
    packed: Tensor,
    rows: int,
    codec: Codec,
    activation_bits: int,
    *,
    values: trellis.Values,
    fused: bool,
) -> Tensor:
    """The product [T, N] with its floats in the order of the kernels, to the last bit.

    Each group of columns adds a * sum(value q), q the codes of the activations; `fused`: rounded
    once with the sum of the groups before.
    """
    cols, group = x.shape[1], codec.group_size
    groups = trellis.rotate(x).unflatten(-1, (-1, group))
    span = torch.full((), reference.ACTIVATION_RANGE[activation_bits])
    largest = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, groups * (span / largest), 0).round().double()
    branches, scales = trellis.unpack(packed, rows, cols, codec)
    matrix = trellis.code_matrix(branches, codec.bits, values)[:rows].double()
    out = torch.zeros(len(x), rows)
    for g in range(cols // group):
        sums = codes[:, g] @ matrix[:, g * group : (g + 1) * group].T  # exact: below 2^53
        product = (largest[:, g] / span).double() * sums.float().double()
        out = ((product if fused else product.float()) + out).float()
    return out * scales.float()


def experts_call(
    tokens: int, hidden: int, inner: int, group: int, activation: str = "silu", bits: int = 16
) -> ExpertsCall:
    generator = torch.Generator().manual_seed(tokens)
    specs = (
        PackedSpec((1, 2.5, 4, 3), group, "trellis"),
        PackedSpec((3.5, 2, 1.5, 4), group, "trellis"),
    )
    shapes = (2 * inner, hidden), (hidden, inner)
    packed = [
        torch.cat([random_packed(*shape, c, seed) for seed, c in enumerate(spec.codecs)])
        for spec, shape in zip(specs, shapes, strict=True)
    ]
    tables = [torch.tensor(s.table(*shape)) for s, shape in zip(specs, shapes, strict=True)]
    index = torch.randint(-1, 5, (tokens, 2), generator=generator)  # -1 and 4 add nothing
    x = torch.randn(tokens, hidden, generator=generator)
    share = torch.rand(tokens, 2, generator=generator)
    sizes = inner, group, group
    return ExpertsCall(x, index, share, *packed, *tables, *sizes, activation, bits, "trellis")


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 5, 64), (40, 384), (7, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotation(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Equal floats, also of columns of a matrix, which are not contiguous."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, ..., 0] = 0
    for given in (x, x.mT.contiguous().mT):
        before = given.clone()
        assert rotate(given).equal(trellis.rotate(x))
        assert rotate_back(given).equal(trellis.rotate_back(x))
        assert given.equal(before)


def test_rotation_of_other_sizes() -> None:
    for shape in ((0, 64), (3, 48)):
        x = torch.randn(shape)
        assert rotate(x).equal(trellis.rotate(x)) and rotate_back(x).equal(trellis.rotate_back(x))
    if not MISSING:
        with pytest.raises(InputError, match="out of range"):
            cpu.trellis_rotate(torch.zeros(2, 48), back=False)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize(
    "rows, cols, group, tokens", [(64, 32, 32, 1), (70, 384, 128, 3), (200, 64, 64, 300)]
)
def test_linear(
    isa: str, bits: float, rows: int, cols: int, group: int, tokens: int, activation_bits: int
) -> None:
    codec = codec_of(bits, group)
    generator = torch.Generator().manual_seed(0)
    packed = random_packed(rows, cols, codec)
    x, bias = (torch.randn(*s, generator=generator) for s in ((tokens, cols), (rows,)))
    y = cpu.linear(x, packed, bias, rows, codec, activation_bits)
    values = values_of(isa, activation_bits, tokens)
    strips = trellis.strips(packed, rows, cols, codec, values)
    rotated = torch.cat([w for _, w in strips])
    codes = reference.round_activations(trellis.rotate(x), group, activation_bits)
    exact = codes.double() @ rotated.double().T + bias.double()
    within_twice_plain(y, codes @ rotated.T + bias, exact)
    args = x, packed, bias, rows, codec, activation_bits
    oracle = reference.linear(*args, rounded=True, values=values)
    torch.testing.assert_close(y, oracle, rtol=1e-5, atol=1e-5 * float(oracle.abs().max()))


@pytest.mark.parametrize(
    "tokens, hidden, inner, group", [(1, 64, 32, 32), (5, 96, 160, 32), (40, 64, 96, 32)]
)
@pytest.mark.parametrize("activation, bits", [("silu", 8), ("silu", 16), ("relu2", 16)])
def test_experts(
    isa: str, tokens: int, hidden: int, inner: int, group: int, activation: str, bits: int
) -> None:
    call = experts_call(tokens, hidden, inner, group, activation, bits)
    y = cpu.experts(call)
    oracle = reference.experts(call, rounded=True, values_of=partial(values_of, isa, bits))
    in_double = {"hidden": call.hidden.double(), "top_k_weights": call.top_k_weights.double()}
    exact = reference.experts(dataclasses.replace(call, **in_double))
    # Each of the two products rounds activations by up to half a code, of 2 * 16256 or 2 * 127 in
    # the range; float32 is far finer.
    assert (y.double() - exact).norm() < {8: 2e-2, 16: 1e-3}[bits] * exact.norm()
    # A float32 sum before the second rounding may tip single codes.
    far = {8: 1e-2, 16: 1e-4}[bits]
    torch.testing.assert_close(y, oracle, rtol=1e-3, atol=far * float(oracle.abs().max()))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_token_depends_on_nothing_else(isa: str, bits: int) -> None:
    """But, with 8 bits, on how many other tokens chose its experts: values are then others."""
    call = experts_call(300, 64, 64, 32, bits=bits)
    together = cpu.experts(call)
    tokens = torch.tensor([0, 255, 256, 299])
    others = call.hidden.clone()
    others[tokens] = 0
    changed = dataclasses.replace(call, hidden=call.hidden - others * 2)
    assert torch.equal(cpu.experts(changed)[tokens], together[tokens])
    names = "hidden", "top_k_index", "top_k_weights"
    some = dataclasses.replace(call, **{name: getattr(call, name)[-7:] for name in names})
    for given, of in ((call, tokens.tolist() if bits == 16 else ()), (some, range(7))):
        expected = cpu.experts(given)
        for t in of:
            token = {name: getattr(given, name)[t : t + 1] for name in names}
            assert torch.equal(cpu.experts(dataclasses.replace(given, **token))[0], expected[t])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(cpu.experts(call), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_every_bit(isa: str, bits: float, activation_bits: int) -> None:
    """Products of one, some and many tokens are different instructions (trellis_product.h)."""
    rows, cols, codec = 130, 384, codec_of(bits, 128)
    packed = random_packed(rows, cols, codec)
    x = torch.randn(37, cols, generator=torch.Generator().manual_seed(1))
    x[5:8] = 0
    x[5:8, 3::128] = 1  # rotation spreads a single number: all codes are the largest
    kinds: tuple[trellis.Values, ...] = "exact", "averages", "bytes"
    oracle = {
        values: product_in_integers(
            x, packed, rows, codec, activation_bits, values=values, fused=isa != "portable"
        )
        for values in kinds
    }
    assert torch.equal(oracle["exact"], oracle["bytes"]) == (bits in (2.5, 3))
    assert torch.equal(oracle["exact"], oracle["averages"]) == (bits <= 2)
    for tokens in (1, 7, 8, 9, 15, 16, 22, 37):
        y = cpu.linear(x[:tokens], packed, None, rows, codec, activation_bits)
        assert torch.equal(y, oracle[values_of(isa, activation_bits, tokens)][:tokens])


def test_numbers_that_do_not_follow_each_other(isa: str) -> None:
    """What compression hands over may be views, such as a diagonal."""
    torch.manual_seed(0)
    rows, cols = 70, 32
    curvature, per_scale = torch.rand(cols, 2)[:, 0], torch.rand(rows, rows).diagonal()
    weighted, residual = torch.randn(rows, cols).T, torch.randn(rows, cols).T
    blocks = torch.randn(cols // 8, 8, 8).triu_()
    found, oracle = torch.zeros(2, rows), torch.zeros(2, rows)
    cpu.trellis_fit(weighted, per_scale, residual, blocks, curvature, found)
    add_in_order(weighted, per_scale, residual.contiguous(), blocks, curvature, oracle)
    torch.testing.assert_close(found, oracle)
    made = cpu.trellis_rows(weighted, residual, per_scale, torch.float32)
    torch.testing.assert_close(made, plain_rows(weighted, residual, per_scale, torch.float32))


def test_opcheck() -> None:
    packed = random_packed(10, 64, codec_of(3))
    linear_args = torch.randn(2, 64), packed, torch.randn(10), 10, 3, 32, 8, "trellis"
    torch.library.opcheck(kernels.linear.op, linear_args)
    torch.library.opcheck(kernels.experts.op, op_arguments(experts_call(3, 64, 32, 32)))


def test_a_token_that_is_not_finite_spoils_no_other_token(isa: str) -> None:
    codec = codec_of(2)
    packed = random_packed(64, 64, codec)
    x = torch.ones(3, 64)
    x[0, 5], x[1] = torch.nan, 0.0
    y = cpu.linear(x, packed, None, 64, codec, 8)
    assert y[0].isnan().all() and y[1].eq(0).all() and y[2].isfinite().all()


def test_wrong_bytes_are_refused(isa: str) -> None:
    codec = codec_of(2)
    packed = random_packed(64, 64, codec)
    x = torch.ones(1, 64)
    with pytest.raises(InputError, match="outside its packed bytes"):
        cpu.linear(x, packed[:-1], None, 64, codec, 8)
    call = experts_call(2, 64, 32, 32)
    damaged = dataclasses.replace(call, gate_up_table=call.gate_up_table.clone())
    damaged.gate_up_table[3, 0] += 64
    with pytest.raises(InputError, match="outside its packed bytes"):
        cpu.experts(damaged)
    damaged.gate_up_table[3] = torch.tensor([0, 8])
    with pytest.raises(InputError, match="no codec"):
        cpu.experts(damaged)
