"""Gates and biases in the C++ kernels, on every instruction set of this machine."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moepress.kernels import Gate, cpu, reference
from moepress.kernels.experts_call import ExpertsCall
from tests.kernels.gates import GATES, gated_call

MISSING = cpu.missing()
FAMILIES = ["int", "trellis"]


def check(call: ExpertsCall) -> Tensor:
    """Compare with the reference in float64; returns the result."""
    y = cpu.experts(call)
    assert y.dtype == call.hidden.dtype
    exact = reference.experts(dataclasses.replace(call, hidden=call.hidden.double()), rounded=True)
    # An activation halfway between two codes may be rounded to either: a code of 254, or of 32512.
    far = {8: 2e-2, 16: 2e-4}[call.activation_bits] + (call.hidden.dtype == torch.bfloat16) * 4e-3
    assert (y - exact).norm() <= far * exact.norm()
    return y


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GATES)
def test_every_gate(isa: str, name: str, family: str) -> None:
    for bits, tokens, biases in (
        (16, 1, (True, True)),
        (16, 9, (False, False)),
        (8, 5, (False, True)),
        (16, 40, (True, False)),
    ):
        check(gated_call(GATES[name], family, biases=biases, tokens=tokens, activation_bits=bits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_biases(isa: str, family: str, dtype: torch.dtype) -> None:
    call = gated_call(GATES["gpt_oss"], family, biases=(True, True), activation_bits=16)
    given = {name: getattr(call, name).to(dtype) for name in ("gate_up_bias", "down_bias")}
    y = check(dataclasses.replace(call, **given))
    same = {name: bias.float() for name, bias in given.items()}
    assert torch.equal(cpu.experts(dataclasses.replace(call, **same)), y)
    mixed = given | {"down_bias": same["down_bias"]}
    assert torch.equal(cpu.experts(dataclasses.replace(call, **mixed)), y)
    check(dataclasses.replace(call, hidden=call.hidden.bfloat16(), **given))
    views = {name: bias.repeat(1, 2)[:, : bias.shape[1]] for name, bias in given.items()}
    assert not views["down_bias"].is_contiguous()
    assert torch.equal(cpu.experts(dataclasses.replace(call, **views)), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_biases_and_no_limit_change_no_bit(isa: str, family: str) -> None:
    for gate in (Gate("silu"), Gate("relu2", gated=False)):
        call = gated_call(gate, family, biases=(True, True))
        zeros = {
            name: torch.zeros_like(getattr(call, name)) for name in ("gate_up_bias", "down_bias")
        }
        none = dict.fromkeys(zeros)
        y = cpu.experts(dataclasses.replace(call, **none))
        assert torch.equal(cpu.experts(dataclasses.replace(call, **zeros)), y)
        # Bounds above every number: other loops, the same results.
        assert torch.equal(cpu.experts(dataclasses.replace(call, limit=1e30, **none)), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_left_out_add_no_bias(isa: str, family: str) -> None:
    call = gated_call(GATES["gpt_oss"], family, biases=(True, True), activation_bits=16)
    tables = {name: getattr(call, name).clone() for name in ("gate_up_table", "down_table")}
    for table in tables.values():
        table[2, 1] = 0
    left_out = dataclasses.replace(call, **tables)
    y = check(left_out)
    index = call.top_k_index.masked_fill(call.top_k_index == 2, -1)
    assert torch.equal(cpu.experts(dataclasses.replace(call, top_k_index=index)), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_depends_on_nothing_else(isa: str, family: str) -> None:
    precision = {"int": 8, "trellis": 16}[family]  # 8: test_trellis_cpu.py
    call = gated_call(
        GATES["gpt_oss"], family, biases=(True, True), tokens=300, activation_bits=precision
    )
    together = cpu.experts(call)
    names = "hidden", "top_k_index", "top_k_weights"
    for t in (0, 255, 299):
        token = {name: getattr(call, name)[t : t + 1] for name in names}
        assert torch.equal(cpu.experts(dataclasses.replace(call, **token))[0], together[t])


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "inkling2", "everything"])
def test_a_token_that_is_not_finite_spoils_no_other_token(isa: str, name: str) -> None:
    call = gated_call(GATES[name], biases=(True, True))
    call.top_k_index[3] = torch.tensor([0, 1, 2])
    clean = cpu.experts(call)
    for bad in (torch.nan, torch.inf):
        hidden = call.hidden.clone()
        hidden[3, 5] = bad
        y = cpu.experts(dataclasses.replace(call, hidden=hidden))
        assert y[3].isnan().all()
        others = torch.arange(len(y)) != 3
        assert torch.equal(y[others], clean[others])
    bias = call.gate_up_bias.clone()
    bias[1, 7] = torch.nan  # reaches every token that chose expert 1, limits or not
    y = cpu.experts(dataclasses.replace(call, gate_up_bias=bias))
    assert torch.equal(y.isnan().all(1), (call.top_k_index == 1).any(1))
