"""The operations on CUDA, emulated, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import GRID_BITS, TRELLIS_BITS, Codec, PackedSpec
from moepress.kernels import backends, cpu, cuda, reference, trellis
from moepress.kernels.cuda.codes import Codes
from moepress.kernels.cuda.launch import Launcher, launcher_for
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.matrix import PackedMatrix
from moepress.kernels.reference import ACTIVATION_RANGE, ACTIVATIONS
from tests.kernels import test_kernels as scalar_tests
from tests.kernels.cuda import emulate
from tests.rounding import test_trellis as trellis_tests

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]

HERE = torch.device("cpu")


def random_packed(rows: int, cols: int, codec: Codec, seed: int = 0) -> Tensor:
    family = trellis_tests if codec.family == "trellis" else scalar_tests
    return family.random_packed(rows, cols, codec, seed)


def codes_of(x: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, K] and scales [rows, G] of reference.round_activations."""
    groups = torch.unflatten(x, -1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    span = torch.tensor(ACTIVATION_RANGE[bits])
    codes = torch.where(largest >= 2.0**-100, groups * (span / largest), 0).round()
    return codes.flatten(-2).int(), torch.where(largest >= 2.0**-100, largest / span, 0)[..., 0]


def joined(q: Tensor) -> Tensor:
    """Codes of one or two planes as integers."""
    return q[0].int() if len(q) == 1 else 128 * q[0].int() + q[1].int()


# Steps of the operations


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("family", ["int", "trellis"])
@pytest.mark.parametrize("cols, group", [(96, 32), (192, 64), (384, 128), (512, 32), (2048, 128)])
def test_rounded_inputs_are_those_of_the_reference(
    cols: int, group: int, family: str, bits: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, cols) * torch.tensor([[1e-20], [1.0], [1e20]])
    x[0, :group] = 0
    codes = Codes(x, 3, cols, group, cuda.PLANES[bits], family)
    codes.round(launcher_for(HERE), x)
    q, scale = codes_of(trellis.rotate(x) if family == "trellis" else x, group, bits)
    assert joined(codes.q).equal(q) and codes.scale.equal(scale)
    assert codes.sum.equal(torch.unflatten(q, 1, (-1, group)).sum(2, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_16_bits(dtype: torch.dtype) -> None:
    x = torch.randn(5, 256).to(dtype)
    codes = Codes(x, 5, 256, 64, 1, "trellis")
    codes.round(launcher_for(HERE), x)
    assert joined(codes.q).equal(codes_of(trellis.rotate(x.float()), 64, 8)[0])


def test_inputs_that_are_not_finite_have_no_scale() -> None:
    x = torch.ones(2, 64)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    codes = Codes(x, 2, 64, 32, 1, "int")
    codes.round(launcher_for(HERE), x)
    assert codes.scale.isnan().tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_gate_of_experts(name: str) -> None:
    torch.manual_seed(0)
    out = torch.randn(3, 7, 2 * 128) * 2
    codes = Codes(out, 7, 128, 32, 2, "trellis")
    used = torch.tensor([6], dtype=torch.int32)
    before = codes.q.clone()
    codes.glu(launcher_for(HERE), out, used, cuda.ACTIVATIONS.index(name))
    gate, up = (out[0] + out[1] + out[2]).chunk(2, dim=1)
    q, scale = codes_of(trellis.rotate(ACTIVATIONS[name](gate) * up), 32, 16)
    assert (joined(codes.q) - q)[:6].abs().max() <= 1  # exponentials differ in their last bit
    torch.testing.assert_close(codes.scale[:6], scale[:6])
    assert codes.q[:, 6].equal(before[:, 6])


def test_activations_have_the_order_of_the_kernels() -> None:
    assert cuda.ACTIVATIONS == cpu.ACTIVATIONS == tuple(sorted(ACTIVATIONS))


@pytest.mark.parametrize(
    "pairs, experts, size",
    [(1, 4, 8), (31, 3, 8), (32, 200, 4), (40, 3, 8), (3000, 70, 64), (3000, 600, 64)],
)
def test_routing_sorts_pairs_by_expert(pairs: int, experts: int, size: int) -> None:
    torch.manual_seed(pairs)
    index = torch.randint(-1, experts + 1, (pairs,))
    tables = torch.ones(2, experts, 2, dtype=torch.int64)
    tables[:, 1, 1] = 0  # expert 1 is left out
    panels = min(pairs, min(experts, pairs) + pairs // size)
    pair, position = (torch.empty(pairs, dtype=torch.int32) for _ in range(2))
    panel, used = torch.empty(panels, 3, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    routing = index, pairs, *tables, experts, size, panels, pair, position, panel, used
    Codes(panel, 1, 64, 64, 1, "int").round(
        launcher_for(HERE), torch.zeros(1, 64), routing, experts
    )
    real = (index >= 0) & (index < experts) & (index != 1)
    order = torch.where(real, index, experts).argsort(stable=True)[: int(real.sum())]
    assert used.item() == len(order) and pair[: len(order)].equal(order.int())
    assert position[order].equal(torch.arange(len(order)).int())
    assert position[~real].eq(-1).all()
    made = panel[panel[:, 2] > 0]
    assert panel[len(made) :].eq(0).all() and (made[:, 2] <= size).all()
    covered = [p for e, first, n in made.tolist() for p in range(first, first + n)]
    assert covered == list(range(len(order)))
    for e, first, n in made.tolist():
        assert index[pair[first : first + n].long()].eq(e).all()


# Operations


def close(result: Tensor, oracle: Tensor, rtol: float = 1e-5) -> None:
    assert result.dtype == oracle.dtype and result.shape == oracle.shape
    torch.testing.assert_close(
        result, oracle, rtol=rtol, atol=rtol * (float(oracle.abs().max()) if oracle.numel() else 0)
    )


CODECS = [Codec(b, g, f) for f, bits in (("int", GRID_BITS), ("trellis", TRELLIS_BITS))
          for b in bits for g in (32, 128)]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_linear(codec: Codec, activation_bits: int, tokens: int) -> None:
    torch.manual_seed(0)
    rows, cols = 100, 256
    packed, x, bias = random_packed(rows, cols, codec), torch.randn(tokens, cols), torch.randn(rows)
    args = packed, bias, rows, codec, activation_bits
    close(cuda.linear(x, *args), reference.linear(x, *args, rounded=True))
    got = cuda.linear(x.bfloat16()[None], packed, bias.bfloat16(), *args[2:])
    wide = reference.linear(
        x.bfloat16().float(), packed, bias.bfloat16().float(), *args[2:], rounded=True
    )
    close(got, wide.bfloat16()[None], rtol=0.01)


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_linear_of_any_memory(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, rows, cols = Codec(2, 32, family), 70, 96
    packed, x = random_packed(rows, cols, codec), torch.randn(11, 2 * cols)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]
    args = None, rows, codec, 8
    expected = reference.linear(x[:, cols:], packed, *args, rounded=True)
    close(cuda.linear(x[:, cols:], moved, *args), expected)
    close(cuda.linear(x[:, cols:][:, None], packed, *args), expected[:, None])
    assert cuda.linear(x[:0, :cols], packed, *args).shape == (0, rows)
    assert cuda.linear(x[:, :cols].double(), packed, *args).dtype == torch.float64
    monkeypatch.setattr(cuda, "MOST_NUMBERS", 3 * rows)
    close(cuda.linear(x[:, cols:], packed, *args), expected)


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_a_matrix_without_rows(family: str) -> None:
    """A grid without blocks is an error of the driver."""
    codec, packed = Codec(2, 32, family), torch.empty(0, dtype=torch.uint8)
    for bias in (None, torch.empty(0)):
        y = cuda.linear(torch.randn(2, 3, 64).half(), packed, bias, 0, codec, 8)
        assert y.shape == (2, 3, 0) and y.dtype == torch.float16
    none = PackedMatrix(packed, 0, codec)
    assert cuda.linears(torch.randn(3, 64), [none, none], 8).shape == (3, 0)
    x, some = torch.randn(3, 64), random_packed(70, 64, codec)
    found = cuda.linears(x, [none, PackedMatrix(some, 70, codec), none], 8)
    close(found, reference.linear(x, some, None, 70, codec, 8, rounded=True))


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_a_token_that_is_not_finite_spoils_no_other_token(family: str) -> None:
    codec = Codec(2, 64, family)
    packed = random_packed(64, 64, codec)
    for tokens in (3, 80):
        x = torch.ones(tokens, 64)
        x[0, 5], x[1] = torch.nan, 0.0
        y = cuda.linear(x, packed, None, 64, codec, 8)
        assert y[0].isnan().all() and y[1].eq(0).all() and y[2:].isfinite().all()


def experts_call(family: str, tokens: int, k: int, bits: int, activation: str) -> ExpertsCall:
    torch.manual_seed(tokens)
    hidden, inner = 128, 96
    widths: tuple[tuple[float, ...], ...] = (1, 2, 0, 4, 3), (3, 2, 0, 1, 4)
    if family == "trellis":
        widths = (1, 2.5, 0, 1.5, 3), (3.5, 2, 0, 1, 2.5)
    specs = [PackedSpec(w, g, family) for w, g in zip(widths, (64, 32), strict=True)]
    shapes = (2 * inner, hidden), (hidden, inner)
    packed = [
        torch.cat([random_packed(*s, Codec(b, spec.group_size, family), b) for b in spec.bits if b])
        for spec, s in zip(specs, shapes, strict=True)
    ]
    tables = [torch.tensor(s.table(*shape)) for s, shape in zip(specs, shapes, strict=True)]
    index = torch.randint(-1, 6, (tokens, k))
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, k)
    return ExpertsCall(x, index, weights, *packed, *tables, inner, 64, 32, activation, bits, family)


@pytest.mark.parametrize("tokens, k", [(0, 2), (1, 2), (3, 4), (60, 2)])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("family", ["int", "trellis"])
def test_experts(family: str, activation_bits: int, tokens: int, k: int) -> None:
    call = experts_call(family, tokens, k, activation_bits, "silu")
    y, oracle = cuda.experts(call), reference.experts(call, rounded=True)
    # An exponential that differs in its last bit may move an input of `down` to the next code.
    close(y, oracle, rtol=1e-2 if activation_bits == 8 else 1e-4)
    assert (y - oracle).norm() <= 2e-3 * oracle.norm()
    half = dataclasses.replace(
        call, hidden=call.hidden.half(), top_k_weights=call.top_k_weights.half()
    )
    assert (cuda.experts(half).float() - oracle).norm() <= 2e-2 * oracle.norm()
    assert cuda.experts(half).dtype == torch.float16


def test_experts_in_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    call = experts_call("trellis", 20, 2, 8, "relu")
    whole = cuda.experts(call)
    monkeypatch.setattr(cuda, "MOST_TOKENS", 7)
    close(cuda.experts(call), whole, rtol=1e-4)


def test_a_bad_table_stops_the_kernel() -> None:
    call = experts_call("trellis", 2, 2, 8, "relu")
    call.top_k_index.fill_(3)
    for entry in ((call.gate_up.numel() - 64, 4), (-64, 4), (0, 7)):
        damaged = dataclasses.replace(call, gate_up_table=call.gate_up_table.clone())
        damaged.gate_up_table[3] = torch.tensor(entry)
        with pytest.raises(emulate.EmulationError, match="trap"):
            cuda.experts(damaged)
    with pytest.raises(InputError, match="Activation 'sine'"):
        cuda.experts(dataclasses.replace(call, activation="sine"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", [Codec(b, 32) for b in GRID_BITS], ids=lambda c: c.name)
def test_embedding(codec: Codec, dtype: torch.dtype) -> None:
    packed, ids = random_packed(50, 96, codec), torch.tensor([[0, 49, 7], [7, 16, 15]])
    args = packed, 50, 96, codec, dtype
    assert cuda.embedding(ids, *args).equal(reference.embedding(ids, *args))
    with pytest.raises(emulate.EmulationError, match="outside the table"):
        cuda.embedding(torch.tensor([50]), *args)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, k", [(1, 2), (50, 8), (3, 40), (0, 2)])
def test_drop(tokens: int, k: int, dtype: torch.dtype, renormalise: bool) -> None:
    torch.manual_seed(k)
    index, weights = torch.randint(-1, 10, (tokens, k)), torch.rand(tokens, k).to(dtype)
    weights[tokens // 2 :, 1] = weights[tokens // 2 :, 0]  # ties
    thresholds = torch.linspace(0, 1, k)
    for keep in (None, torch.rand(tokens) < 0.3):
        args = index, weights, thresholds, renormalise, keep, 9
        ours, theirs = cuda.drop(*args), reference.drop(*args)
        assert ours[0].equal(theirs[0]) and ours[2].equal(theirs[2])
        torch.testing.assert_close(ours[1], theirs[1])


def test_a_launcher_is_chosen_by_device() -> None:
    assert isinstance(launcher_for(HERE), Launcher)


def test_ops_reach_the_kernels_and_compile() -> None:
    backend = dataclasses.replace(
        backends.BACKENDS["cuda"], device_types=("cpu",), refuses=lambda device: None
    )
    call = experts_call("trellis", 3, 2, 8, "silu")
    expected = cuda.experts(call)
    with kernels.only("cuda"):
        kernels.register_backend(backend)
        compiled = torch.compile(kernels.experts, fullgraph=True, backend="aot_eager")
        assert compiled(*scalar_tests.op_arguments(call)).equal(expected)
        torch.library.opcheck(kernels.experts.op, scalar_tests.op_arguments(call))
    torch._dynamo.reset()
