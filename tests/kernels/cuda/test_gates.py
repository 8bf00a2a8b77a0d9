"""Gates and biases in the CUDA kernels, emulated, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moepress.kernels import Gate, cuda, reference
from moepress.kernels.cuda import grouped
from moepress.kernels.experts_call import ExpertsCall
from tests.kernels.cuda import emulate
from tests.kernels.gates import GATES, gated_call

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]

FAMILIES = ["int", "trellis"]


def far(found: Tensor, call: ExpertsCall, *, rounded: bool = True) -> float:
    """The distance to the reference in float64, relative to its norm."""
    exact = reference.experts(
        dataclasses.replace(call, hidden=call.hidden.double()), rounded=rounded
    )
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name: str, family: str) -> None:
    for bits, tokens, biases in (
        (16, 1, (True, True)),
        (16, 9, (False, False)),
        (8, 5, (False, True)),
        (16, 40, (True, False)),
    ):
        options = {"biases": biases, "tokens": tokens, "activation_bits": bits}
        call = gated_call(GATES[name], family, **options)
        # An activation halfway between two codes may be rounded to either: of 254, or of 32512.
        assert far(cuda.experts(call), call) < {8: 2e-2, 16: 2e-4}[bits]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_biases(family: str, dtype: torch.dtype) -> None:
    call = gated_call(GATES["gpt_oss"], family, biases=(True, True), activation_bits=16)
    given = {name: getattr(call, name).to(dtype) for name in ("gate_up_bias", "down_bias")}
    y = cuda.experts(dataclasses.replace(call, **given))
    same = {name: bias.float() for name, bias in given.items()}
    assert y.equal(cuda.experts(dataclasses.replace(call, **same)))
    assert far(y, dataclasses.replace(call, **given)) < 2e-4
    odd = {name: torch.cat([b[:1, :1], b.flatten()[None]], 1)[0, 1:].view_as(b)
           for name, b in given.items()}  # fmt: skip
    assert y.equal(cuda.experts(dataclasses.replace(call, **odd)))


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_biases_and_no_limit_change_nothing(family: str) -> None:
    """The kernels of plain gates and those of any gate give the same bits."""
    call = gated_call(Gate("gelu"), family, biases=(True, True))
    zeros = {name: torch.zeros_like(getattr(call, name)) for name in ("gate_up_bias", "down_bias")}
    y = cuda.experts(dataclasses.replace(call, **dict.fromkeys(zeros)))
    assert cuda.experts(dataclasses.replace(call, **zeros)).equal(y)
    z, zero = torch.empty_like(y), torch.empty_like(y)
    grouped.experts(dataclasses.replace(call, **dict.fromkeys(zeros)), z)
    grouped.experts(dataclasses.replace(call, **zeros), zero)
    assert zero.equal(z)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_left_out_add_no_bias(family: str) -> None:
    call = gated_call(GATES["gpt_oss"], family, biases=(True, True), activation_bits=16)
    tables = {name: getattr(call, name).clone() for name in ("gate_up_table", "down_table")}
    for table in tables.values():
        table[2, 1] = 0
    call = dataclasses.replace(call, **tables)
    assert far(cuda.experts(call), call) < 2e-4
    call.top_k_index[3] = 2
    assert cuda.experts(call)[3].eq(0).all()


def test_calls_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    call = gated_call(GATES["gpt_oss"], biases=(True, True), tokens=20)
    whole = cuda.experts(call)
    monkeypatch.setattr(cuda, "MOST_TOKENS", 7)
    torch.testing.assert_close(cuda.experts(call), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scratch", [1, 1 << 30])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GATES)
def test_very_many_tokens(
    name: str, family: str, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products in bfloat16, in one chunk of rows and in several."""
    monkeypatch.setattr(grouped, "GRAIN", 32)
    monkeypatch.setattr(grouped, "SCRATCH_BYTES", scratch)
    for biases, dtype in (((True, True), torch.float32), ((False, False), torch.bfloat16)):
        call = gated_call(GATES[name], family, biases=biases, tokens=12, dtype=dtype)
        y = torch.full_like(call.hidden, torch.nan)
        grouped.experts(call, y)
        assert far(y, call, rounded=False) < 1.5e-2


def test_a_token_that_is_not_finite_spoils_no_other_token() -> None:
    call = gated_call(GATES["everything"], biases=(True, True))
    call.top_k_index[3] = torch.tensor([0, 1, 2])
    clean = cuda.experts(call)
    hidden = call.hidden.clone()
    hidden[3, 5] = torch.inf
    y = cuda.experts(dataclasses.replace(call, hidden=hidden))
    others = torch.arange(len(y)) != 3
    assert y[3].isnan().all() and y[others].equal(clean[others])
    assert call.gate_up_bias is not None
    bias = call.gate_up_bias.clone()
    bias[1, 7] = torch.nan  # reaches every token that chose expert 1, limits or not
    y = cuda.experts(dataclasses.replace(call, gate_up_bias=bias))
    assert y.isnan().all(1).equal((call.top_k_index == 1).any(1))
