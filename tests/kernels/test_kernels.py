"""Packing against an oracle written from docs/format.md, ops against float64 loops."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import GRID_BITS, GROUP_SIZES, Codec, PackedSpec
from moepress.kernels import reference, scalar
from moepress.kernels.checks import check_one_device
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.reference import ACTIVATIONS, dequantize
from moepress.kernels.scalar import pack, unpack

pytestmark = pytest.mark.usefixtures("reference_backend")  # test_cpu.py tests the other backend

CODECS = [Codec(bits, group) for bits in GRID_BITS for group in GROUP_SIZES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_fields(
    rows: int, cols: int, codec: Codec, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of a matrix whose weights have a standard deviation near 0.1."""
    generator = torch.Generator().manual_seed(seed)
    groups = codec.groups(cols)
    codes = torch.randint(codec.levels + 1, (rows, cols), generator=generator, dtype=torch.uint8)
    scales = (0.1 + 0.2 * torch.rand(rows, groups, generator=generator)) / codec.levels
    zeros = torch.randint(256, (rows, groups), generator=generator, dtype=torch.uint8)
    return codes, scales.bfloat16(), zeros if codec.has_zero else None


def random_packed(rows: int, cols: int, codec: Codec, seed: int = 0) -> Tensor:
    return pack(*random_fields(rows, cols, codec, seed), codec)


def oracle_bytes(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> bytes:
    """The formulas of docs/format.md, 'Where to find w[n, k]', one value at a time."""
    (N, K), b, g = codes.shape, codec.bits, codec.group_size
    G = K // g
    S = 2 * K * b + 32 * G + (16 * G if b in (2, 3, 4) else 0)
    out = bytearray(((N + 15) // 16 * S + 63) // 64 * 64)
    planes = [(2, 0, 0), (1, 2, 4 * g)] if b == 3 else [(b, 0, 0)]  # bits, shift, first byte
    scale_bytes = scales.view(torch.uint8).view(N, G, 2)
    for n in range(N):
        block, r = divmod(n, 16)
        for k in range(K):
            q, c = divmod(k, g)
            for p, shift, first in planes:
                plane = block * S + q * 2 * g * b + first
                byte = plane + (c // (32 // p)) * 64 + r * 4 + c % 4
                value = (int(codes[n, k]) >> shift) % 2**p
                out[byte] |= value << (p * ((c % (32 // p)) // 4))
        for q in range(G):
            at = block * S + 2 * K * b + (q * 16 + r) * 2
            out[at : at + 2] = bytes(scale_bytes[n, q].tolist())
            if zeros is not None:
                out[block * S + 2 * K * b + 32 * G + q * 16 + r] = int(zeros[n, q])
    return bytes(out)


def oracle_weights(codes: Tensor, scales: Tensor, zeros: Tensor | None, codec: Codec) -> np.ndarray:
    """scale * (code - zero), each operation in float32."""
    levels, one = np.float32(codec.levels), np.float32(1)
    w = np.empty(codes.shape, np.float32)
    for (n, k), code in np.ndenumerate(codes.numpy()):
        q = k // codec.group_size
        if zeros is None:
            zero = levels / np.float32(2)
        else:
            zero = np.float32(int(zeros[n, q])) * levels / np.float32(255)
        w[n, k] = np.float32(float(scales[n, q])) * (np.float32(code) * one - zero)
    return w


# Packing


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("rows, groups", [(1, 1), (16, 1), (21, 2), (33, 1)])
def test_bytes_are_those_of_the_format(codec: Codec, rows: int, groups: int) -> None:
    fields = random_fields(rows, groups * codec.group_size, codec)
    packed = pack(*fields, codec)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codec.nbytes(rows, groups * codec.group_size),)
    assert bytes(packed.tolist()) == oracle_bytes(*fields, codec)


def test_bytes_never_change() -> None:
    """The first bytes of a matrix written out by hand: format version 1."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :16] = torch.tensor([1, 2, 3, 0, 3, 0, 0, 1, 2, 0, 0, 0, 1, 0, 3, 2])
    scales = torch.tensor([[1.5]]).bfloat16()  # 0x3fc0
    zeros = torch.tensor([[85]], dtype=torch.uint8)
    packed = pack(codes, scales, zeros, Codec(2, 32))
    first = [0b01_10_11_01, 0b00_00_00_10, 0b11_00_00_11, 0b10_00_01_00]
    assert packed[:4].tolist() == first
    assert packed[4:128].eq(0).all()
    assert packed[128:130].tolist() == [0xC0, 0x3F]
    assert packed[160].item() == 85
    assert dequantize(packed, 1, 32, Codec(2, 32))[0, :4].tolist() == [0.0, 1.5, 3.0, -1.5]


@given(
    codec=st.sampled_from(CODECS),
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_unpack_gives_back_what_was_packed(codec: Codec, rows: int, groups: int, seed: int) -> None:
    fields = random_fields(rows, groups * codec.group_size, codec, seed)
    back = unpack(pack(*fields, codec), rows, groups * codec.group_size, codec)
    for before, after in zip(fields, back, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_dequantize_is_the_formula_to_the_last_bit(codec: Codec) -> None:
    rows, cols = 19, 2 * codec.group_size
    fields = random_fields(rows, cols, codec)
    packed = pack(*fields, codec)
    expected = torch.from_numpy(oracle_weights(*fields, codec))
    assert torch.equal(dequantize(packed, rows, cols, codec), expected)
    half = dequantize(packed, rows, cols, codec, torch.bfloat16)
    assert torch.equal(half, expected.bfloat16())


def test_long_matrices_are_unpacked_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, rows, cols = Codec(3, 64), 100, 128
    packed, x = random_packed(rows, cols, codec), torch.randn(3, cols)
    whole, y = dequantize(packed, rows, cols, codec), reference.linear(x, packed, None, rows, codec)
    monkeypatch.setattr(scalar, "STRIP_WEIGHTS", 2 * 16 * cols)
    assert torch.equal(dequantize(packed, rows, cols, codec), whole)
    torch.testing.assert_close(reference.linear(x, packed, None, rows, codec), y)


@pytest.mark.parametrize("codec", [Codec(3, 64), Codec(8, 64)], ids=lambda c: c.name)
def test_long_matrices_are_packed_in_strips(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = random_fields(100, 128, codec)
    whole = pack(*fields, codec)
    monkeypatch.setattr(scalar, "STRIP_WEIGHTS", 2 * 16 * 128)
    assert torch.equal(pack(*fields, codec), whole)


@pytest.mark.parametrize("first", [1, 2, 64])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_a_matrix_may_start_at_any_byte_of_memory(codec: Codec, first: int) -> None:
    """Tensors mapped from a file are not aligned. One block of one group, and several."""
    for rows, cols in ((5, codec.group_size), (40, 3 * codec.group_size)):
        packed = random_packed(rows, cols, codec)
        moved = torch.cat([torch.zeros(first, dtype=torch.uint8), packed])[first:]
        assert torch.equal(
            dequantize(moved, rows, cols, codec), dequantize(packed, rows, cols, codec)
        )


def test_pack_refuses_what_does_not_fit() -> None:
    codec = Codec(2, 32)
    codes, scales, zeros = random_fields(4, 64, codec)
    for wrong in (
        (codes + 4, scales, zeros),
        (codes.int(), scales, zeros),
        (codes, scales.float(), zeros),
        (codes, scales[:, :1], zeros),
        (codes, scales, None),
        (codes, scales, zeros.int()),
        (codes[:, :33], scales, zeros),
    ):
        with pytest.raises(InputError):
            pack(*wrong, codec)
    with pytest.raises(InputError, match="stores no zeros"):
        pack(codes % 2, scales, zeros, Codec(1, 32))
    with pytest.raises(InputError, match=r"is \[384\] uint8, got \[383\]"):
        unpack(pack(codes, scales, zeros, codec)[:-1], 4, 64, codec)


# Ops


def within_twice_plain(result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of plain PyTorch in the same dtype."""
    assert result.dtype == plain.dtype
    ours, theirs = (float((y.double() - exact).norm()) for y in (result, plain))
    assert ours <= 2 * theirs + 1e-6 * float(exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [Codec(b, 32) for b in GRID_BITS] + [Codec(3, 128)], ids=str)
@pytest.mark.parametrize("rows, shape", [(37, (1,)), (16, (2, 3)), (50, (0,))])
def test_linear(codec: Codec, dtype: torch.dtype, rows: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    cols = 128
    packed, x = random_packed(rows, cols, codec), torch.randn(*shape, cols).to(dtype)
    bias = torch.randn(rows).to(dtype)
    weight = dequantize(packed, rows, cols, codec)
    exact = x.double() @ weight.double().T + bias.double()
    y = kernels.linear(x, packed, bias, rows, codec.bits, codec.group_size)
    within_twice_plain(y, F.linear(x, weight.to(dtype), bias), exact)
    no_bias = kernels.linear(x, packed, None, rows, codec.bits, codec.group_size)
    within_twice_plain(no_bias, F.linear(x, weight.to(dtype)), exact - bias.double())


def op_arguments(call: ExpertsCall) -> tuple[object, ...]:
    """The arguments of `kernels.experts`, in order."""
    return tuple(getattr(call, field.name) for field in dataclasses.fields(call))


@dataclasses.dataclass
class Case:
    """Experts of mixed widths and the routing of a few tokens to them."""

    hidden: Tensor  # [T, H]
    index: Tensor  # [T, k]
    weights: Tensor  # [T, k]
    specs: tuple[PackedSpec, PackedSpec]
    packed: tuple[Tensor, Tensor]
    intermediate: int
    activation: str = "silu"

    def call(self, activation_bits: int = 8) -> ExpertsCall:
        tables = [
            torch.tensor(spec.table(*shape))
            for spec, shape in zip(self.specs, self.shapes, strict=True)
        ]
        return ExpertsCall(
            self.hidden,
            self.index,
            self.weights,
            *self.packed,
            *tables,
            self.intermediate,
            *(spec.group_size for spec in self.specs),
            self.activation,
            activation_bits,
        )

    @property
    def args(self) -> tuple[object, ...]:
        return op_arguments(self.call())

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        hidden, inner = self.hidden.shape[1], self.intermediate
        return (2 * inner, hidden), (hidden, inner)

    def matrix(self, which: int, expert: int) -> Tensor:
        spec, shape = self.specs[which], self.shapes[which]
        first, end = spec.offsets(*shape)[expert : expert + 2]
        return dequantize(self.packed[which][first:end], *shape, spec.codecs[expert])

    def loop(self, dtype: torch.dtype) -> Tensor:
        """The result in `dtype`, computed for one token and one of its choices at a time."""
        out = torch.zeros(self.hidden.shape, dtype=torch.promote_types(dtype, torch.float32))
        act, inner = ACTIVATIONS[self.activation], self.intermediate
        count = len(self.specs[0].bits)
        matrices = [[self.matrix(i, e).to(dtype) for i in (0, 1)] for e in range(count)]
        for t, (experts, weights) in enumerate(zip(self.index, self.weights, strict=True)):
            for e, weight in zip(experts.tolist(), weights, strict=True):
                if 0 <= e < count:
                    gate_up, down = matrices[e]
                    x = self.hidden[t].to(dtype)
                    y = down @ (act(gate_up[:inner] @ x) * (gate_up[inner:] @ x))
                    out[t] += weight.to(out.dtype) * y
        return out.to(dtype)


def make_case(
    dtype: torch.dtype = torch.float32, tokens: int = 7, k: int = 2, activation: str = "silu"
) -> Case:
    torch.manual_seed(2)
    hidden_size, inner = 64, 96
    specs = PackedSpec((1, 2, 3, 4, 8), 64), PackedSpec((3, 8, 1, 2, 2), 32)
    packed = tuple(
        torch.cat([random_packed(*shape, codec, seed) for seed, codec in enumerate(spec.codecs)])
        for spec, shape in zip(specs, ((2 * inner, hidden_size), (hidden_size, inner)), strict=True)
    )
    hidden = torch.randn(tokens, hidden_size).to(dtype)
    index = torch.rand(tokens, 4).topk(k).indices if tokens else torch.empty(0, k).long()
    weights = torch.rand(tokens, k)
    return Case(hidden, index, weights, specs, packed, inner, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, k", [(7, 2), (1, 2), (40, 1), (3, 4), (0, 2)])
def test_experts(dtype: torch.dtype, tokens: int, k: int) -> None:
    case = make_case(dtype, tokens, k)
    y = kernels.experts(*case.args)
    assert y.shape == case.hidden.shape
    within_twice_plain(y, case.loop(dtype), case.loop(torch.float64))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_experts_with_every_activation(activation: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(ACTIVATIONS[activation](x), ACT2FN[activation](x))
    case = make_case(activation=activation)
    within_twice_plain(
        kernels.experts(*case.args), case.loop(torch.float32), case.loop(torch.float64)
    )


@pytest.mark.parametrize("sentinel", [5, -1, 1000])
def test_an_index_that_is_no_expert_contributes_nothing(sentinel: int) -> None:
    case = make_case()
    case.index[0] = sentinel
    case.index[1, 0] = sentinel
    y = kernels.experts(*case.args)
    assert y[0].eq(0).all()
    within_twice_plain(y, case.loop(torch.float32), case.loop(torch.float64))


def test_an_expert_chosen_twice_by_a_token_counts_twice() -> None:
    case = make_case()
    case.index[:, 1] = case.index[:, 0]
    exact = case.loop(torch.float64)
    within_twice_plain(kernels.experts(*case.args), case.loop(torch.float32), exact)


def test_only_experts_in_use_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    case.index = torch.tensor([[1, 3]] * 6 + [[3, 5]])
    unpacked = []
    strips = reference._strips

    def spy(
        packed: Tensor, rows: int, cols: int, codec: Codec, *how: bool
    ) -> Iterator[tuple[int, Tensor]]:
        unpacked.append(codec.bits)
        return strips(packed, rows, cols, codec, *how)

    monkeypatch.setattr(reference, "_strips", spy)
    kernels.experts(*case.args)
    assert unpacked == [2, 8, 4, 2]  # gate_up and down of expert 1, then of expert 3


def test_float32_weights_are_summed_in_float32() -> None:
    """512 choices of weight 1 / 512: a sum in bfloat16 would stop growing."""
    case = make_case(torch.bfloat16, tokens=1)
    case.index = torch.full((1, 512), 2)
    case.weights = torch.full((1, 512), 1 / 512)
    one = dataclasses.replace(case, index=torch.tensor([[2]]), weights=torch.ones(1, 1))
    torch.testing.assert_close(
        kernels.experts(*case.args), kernels.experts(*one.args), rtol=2**-8, atol=0
    )


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_embedding(codec: Codec) -> None:
    rows, cols = 53, codec.group_size
    packed = random_packed(rows, cols, codec)
    table = dequantize(packed, rows, cols, codec)
    for ids in (torch.tensor([[3, 52, 3], [0, 17, 16]]), torch.tensor(5), torch.empty(0).long()):
        got = kernels.embedding(
            ids, packed, rows, cols, codec.bits, codec.group_size, torch.float32
        )
        assert torch.equal(got, table[ids])
    for wrong in (-1, rows):
        with pytest.raises(InputError, match="expected 0 to 52"):
            kernels.embedding(
                torch.tensor([0, wrong]), packed, rows, cols, codec.bits, cols, torch.float32
            )


def test_ops_refuse_arguments_that_do_not_fit() -> None:
    case = make_case()
    packed = random_packed(8, 64, Codec(2, 32))
    with pytest.raises(InputError, match="uint8, contiguous"):
        kernels.linear(torch.randn(2, 64), packed[:-64], None, 8, 2, 32)
    with pytest.raises(InputError, match="does not divide"):
        kernels.linear(torch.randn(2, 65), packed, None, 8, 2, 32)
    with pytest.raises(InputError, match=r"bias must be \[8\], got \[1\]"):
        kernels.linear(torch.randn(2, 64), packed, torch.zeros(1), 8, 2, 32)
    # The dtype of a packed weight, to which some code casts inputs: the result would be bytes.
    numbers = torch.ones(2, 64, dtype=torch.uint8)
    for wrong_call in (
        lambda: kernels.linear(numbers, packed, None, 8, 2, 32),
        lambda: kernels.linears(numbers, [packed], [8], [2], 32),
        lambda: kernels.experts(
            *op_arguments(dataclasses.replace(case.call(), hidden=case.hidden.byte()))
        ),
    ):
        with pytest.raises(InputError, match=r"got inputs of torch\.uint8"):
            wrong_call()
    # Not through the op: with a meta tensor it runs its fake, and there is no other device here.
    with pytest.raises(InputError, match="weight is on meta, the input on cpu"):
        check_one_device(case.hidden, bias=None, weight=packed.to("meta"))
    call = case.call()
    for wrong in (
        {"hidden": case.hidden[0]},
        {"top_k_index": case.index[:3]},
        {"gate_up_table": call.gate_up_table.int()},
    ):
        with pytest.raises(InputError, match=r"xpected|must be"):
            kernels.experts(*op_arguments(dataclasses.replace(call, **wrong)))
    with pytest.raises(InputError, match=r"'swoosh' is not supported.*silu"):
        kernels.experts(*op_arguments(dataclasses.replace(call, activation="swoosh")))
    for packed_ones, rows in (([packed], [8, 8]), ([], [])):
        with pytest.raises(InputError, match="as many weights as rows"):
            kernels.linears(torch.randn(2, 64), packed_ones, rows, [2] * len(rows), 32)


def test_several_linears_are_as_each_alone() -> None:
    x, widths, rows = torch.randn(2, 3, 64), (3, 2, 8), (10, 1, 7)
    packed = [random_packed(n, 64, Codec(b, 32)) for n, b in zip(rows, widths, strict=True)]
    each = [
        kernels.linear(x, p, None, n, b, 32) for p, n, b in zip(packed, rows, widths, strict=True)
    ]
    found = kernels.linears(x, packed, list(rows), list(widths), 32)
    assert torch.equal(found, torch.cat(each, -1))


# As torch.library ops


def op_calls() -> list[tuple[object, tuple[object, ...]]]:
    codec = Codec(3, 32)
    packed = random_packed(10, 64, codec)
    return [
        (kernels.linear, (torch.randn(2, 3, 64), packed, torch.randn(10), 10, 3, 32)),
        (kernels.linear, (torch.randn(1, 64), packed, None, 10, 3, 32)),
        (kernels.embedding, (torch.tensor([[1, 9]]), packed, 10, 64, 3, 32, torch.bfloat16)),
        (kernels.experts, make_case().args),
        (kernels.linears, (torch.randn(2, 64), [packed, packed], [10, 10], [3, 3], 32)),
    ]


@pytest.mark.parametrize("call", range(5))
def test_opcheck(call: int) -> None:
    op, args = op_calls()[call]
    torch.library.opcheck(op.op, args)


@pytest.mark.parametrize("call", range(5))
def test_compiles_to_one_graph(call: int) -> None:
    op, args = op_calls()[call]
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), op(*args))
    torch._dynamo.reset()


# Backends


def fake_backend(name: str, rank: int, refusal: str | None, types: tuple[str, ...]) -> object:
    return dataclasses.replace(
        kernels.BACKENDS["reference"],
        name=name,
        rank=rank,
        device_types=types,
        refuses=lambda device: refusal,
        linear=lambda x, packed, bias, out_features, codec, bits: torch.full((1,), float(rank)),
    )


@pytest.fixture
def table() -> Iterator[None]:
    """Restores the backend table afterwards."""
    before = dict(kernels.BACKENDS)
    yield
    kernels.BACKENDS.clear()
    for backend in before.values():
        kernels.register_backend(backend)


def test_the_reference_runs_everywhere_without_a_warning(
    table: None, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.register_backend(fake_backend("other-device", 9, "never asked", ("cuda",)))
    cpu = kernels.status()[0]
    assert (cpu.device, cpu.backend, dict(cpu.refused)) == ("cpu", "reference", {})
    assert not caplog.records


def test_the_best_backend_runs_and_a_refusal_is_logged_once(
    table: None, caplog: pytest.LogCaptureFixture
) -> None:
    args = torch.randn(1, 64), random_packed(10, 64, Codec(3, 32)), None, 10, 3, 32
    kernels.register_backend(fake_backend("good", 1, None, ("cpu",)))
    kernels.register_backend(fake_backend("best", 2, "this CPU has no AVX-512", ("cpu",)))
    with caplog.at_level(logging.WARNING):
        assert kernels.linear(*args).item() == 1
        assert kernels.linear(*args).item() == 1
    assert [r.getMessage() for r in caplog.records] == [
        "cpu runs good, not best: this CPU has no AVX-512"
    ]
    assert dict(kernels.status()[0].refused) == {"best": "this CPU has no AVX-512"}
    kernels.register_backend(fake_backend("best", 2, None, ("cpu",)))
    assert kernels.linear(*args).item() == 2


def test_no_backend_is_an_error(table: None) -> None:
    kernels.register_backend(fake_backend("reference", 1, "broken", ()))
    with pytest.raises(InputError, match="broken"):
        kernels.backend_for(torch.device("cpu"))
