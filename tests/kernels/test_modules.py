"""Packed modules give the results of the modules they replace, and their bytes stay intact."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from moepress.errors import InputError
from moepress.format.codec import Codec, PackedSpec
from moepress.kernels import cpu
from moepress.kernels.gate import Gate
from moepress.kernels.modules import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    set_activation_bits,
)
from moepress.kernels.reference import dequantize
from tests.kernels.test_kernels import make_case, random_packed

CODEC = Codec(3, 32)


def packed_linear(bias: bool = False) -> PackedLinear:
    module = PackedLinear(64, 20, CODEC, bias)
    module.weight.copy_(random_packed(20, 64, CODEC))
    return module


def packed_experts() -> tuple[PackedExperts, tuple[Tensor, Tensor, Tensor]]:
    case = make_case()
    module = PackedExperts(5, 64, 96, *case.specs, Gate(case.activation))
    fill(module)
    return module, (case.hidden, case.index, case.weights)


def fill(module: PackedExperts) -> None:
    for parameter, packed in zip(module.parameters(), make_case().packed, strict=True):
        parameter.copy_(packed)


@pytest.mark.usefixtures("reference_backend")
def test_linear_equals_the_linear_it_replaces() -> None:
    module = packed_linear(bias=True)
    nn.init.normal_(module.bias)
    plain = nn.Linear(64, 20)
    plain.load_state_dict({"weight": dequantize(module.weight, 20, 64, CODEC), "bias": module.bias})
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(module(x), plain(x))
    assert packed_linear().bias is None
    assert set(module.state_dict()) == {"weight", "bias"}


def test_embedding_equals_the_table_it_replaces_in_the_dtype_of_the_model() -> None:
    module = PackedEmbedding(20, 64, CODEC)
    module.weight.copy_(random_packed(20, 64, CODEC))
    table = dequantize(module.weight, 20, 64, CODEC)
    ids = torch.tensor([[0, 19], [3, 3]])
    assert torch.equal(module(ids), table[ids])
    assert torch.equal(module.to(torch.bfloat16)(ids), table[ids].bfloat16())
    assert set(module.state_dict()) == {"weight"}


@pytest.mark.usefixtures("reference_backend")
def test_experts_equal_a_loop_over_their_matrices() -> None:
    module, args = packed_experts()
    exact = make_case().loop(torch.float64)
    torch.testing.assert_close(module(*args).double(), exact, rtol=1e-5, atol=1e-6)
    names = dict(module.named_parameters())
    assert set(module.state_dict()) == set(names) == {"gate_up_proj", "down_proj"}
    assert not any(parameter.requires_grad for parameter in names.values())


@pytest.mark.parametrize("change", ["deepcopy", "pickle", "meta", "to_empty", "meta forward"])
def test_the_expert_tables_survive(change: str) -> None:
    module, args = packed_experts()
    expected = module(*args)
    if change == "deepcopy":
        module = copy.deepcopy(module)
    elif change == "pickle":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        module = torch.load(buffer, weights_only=False)
    elif change == "meta":  # as from_pretrained builds it: on meta, then parameter by parameter
        with torch.device("meta"):
            empty = PackedExperts(5, 64, 96, module.gate_up, module.down, Gate("silu"))
        assert empty.gate_up_proj.is_meta
        empty.load_state_dict(module.state_dict(), assign=True)
        module = empty
    elif change == "to_empty":
        module = module.to("meta").to_empty(device="cpu")
        fill(module)
    else:
        meta = copy.deepcopy(module).to("meta")
        assert meta(*(a.to("meta") for a in args)).shape == expected.shape
        module = meta.to_empty(device="cpu")
        fill(module)
    assert torch.equal(module(*args), expected)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_casts_leave_packed_bytes_alone(cast: object) -> None:
    model = nn.Sequential(packed_linear(bias=True), packed_experts()[0])
    before = {k: v.clone() for k, v in model.state_dict().items() if v.dtype == torch.uint8}
    after = cast(model).state_dict()
    assert len(before) == 3
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model[0].bias.dtype in (torch.float16, torch.bfloat16)


def test_experts_compile_to_one_graph_for_decoding() -> None:
    module, (hidden, index, weights) = packed_experts()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (1, 2, 7):
        args = hidden[:tokens], index[:tokens], weights[:tokens]
        assert torch.equal(compiled(*args), module(*args))
    torch._dynamo.reset()


def test_modules_describe_themselves() -> None:
    assert "int3-g32" in repr(packed_linear())
    text = repr(packed_experts()[0])
    assert "1x1-bit+2x2-bit+1x3-bit+1x8-bit g32" in text
    assert "gate=silu" in text
    assert "num_experts=5" in text


def test_experts_refuse_what_does_not_fit() -> None:
    spec = PackedSpec((2, 2), 32)
    with pytest.raises(InputError, match="3 experts, but 2 widths"):
        PackedExperts(3, 64, 96, spec, spec, Gate("silu"))
    with pytest.raises(InputError, match="'swoosh' is not supported"):
        PackedExperts(2, 64, 96, spec, spec, Gate("swoosh"))
    with pytest.raises(InputError, match="does not divide a row of 48"):
        PackedExperts(2, 64, 48, spec, spec, Gate("silu"))


@pytest.mark.skipif(cpu.missing() is not None, reason="the reference does not round activations")
def test_activation_bits_are_set_everywhere_and_take_effect() -> None:
    experts, args = packed_experts()
    linear, x = packed_linear(), torch.randn(3, 64)
    model = nn.ModuleList([experts, linear, nn.Linear(2, 2)])
    exact = (
        make_case().loop(torch.float64),
        x.double() @ dequantize(linear.weight, 20, 64, CODEC).double().T,
    )
    errors = {}
    for bits in (8, 16):
        set_activation_bits(model, bits)
        results = experts(*args), linear(x)
        errors[bits] = [float((y - e).norm()) for y, e in zip(results, exact, strict=True)]
    assert all(fine < coarse / 50 for coarse, fine in zip(errors[8], errors[16], strict=True))
    with pytest.raises(InputError, match=r"activation_bits is 4. Expected one of \[8, 16\]"):
        set_activation_bits(model, 4)
    with pytest.raises(InputError, match="no packed weights"):
        set_activation_bits(nn.Linear(2, 2), 8)


def test_a_packed_linear_refuses_inputs_that_are_no_floats() -> None:
    """Some models cast the head's inputs to the dtype of its weight (hy_v4): bytes, if packed."""
    linear = PackedLinear(32, 4, Codec(4, 32))
    with pytest.raises(InputError, match=r"got inputs of torch\.uint8"):
        linear(torch.ones(1, 32).to(linear.weight.dtype))
