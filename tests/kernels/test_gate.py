"""What lies between the two products of an expert, and biases: the reference and the modules."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import PackedSpec
from moepress.kernels import Gate, reference
from moepress.kernels.experts_call import check_experts_call
from moepress.kernels.modules import PackedExperts
from tests.kernels.gates import GATES, WIDTHS, experts_oracle, gate_oracle, gated_call
from tests.kernels.test_kernels import op_arguments

BIASES = [(False, False), (True, True)]


@pytest.mark.parametrize("name", GATES)
def test_the_formula(name: str) -> None:
    gate = GATES[name]
    x = 6 * torch.randn(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([gate_oracle(gate, row) for row in x])
    torch.testing.assert_close(reference.gated(gate, x), exact)
    plain = reference.gated(Gate(gate.activation, gate.gated), x)
    assert gate.plain == torch.allclose(plain, exact)
    single = reference.gated(gate, x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, experts, gate, options",
    [
        ("deepseek_v4", "DeepseekV4Experts", Gate("silu", limit=2.0), {"swiglu_limit": 2.0}),
        ("hy_v4", "HYV4Experts", Gate("silu", limit=2.0), {"swiglu_limit": 2.0}),
        (
            "gpt_oss",
            "GptOssExperts",
            Gate("silu", limit=2.0, alpha=1.702, up_offset=1.0),
            {"swiglu_limit": 2.0, "swiglu_alpha": 1.702},
        ),
        (
            "minimax_m3_vl",
            "MiniMaxM3VLExperts",
            Gate("silu", limit=2.0, alpha=1.702, up_offset=1.0),
            {"swiglu_limit": 2.0, "swiglu_alpha": 1.702},
        ),
        (
            "inkling2",
            "Inkling2Experts",
            Gate("silu", gate_softcap=4.0, up_softcap=2.0),
            {"mlp_gate_softcap": 4.0, "mlp_up_softcap": 2.0},
        ),
        (
            "step3p7",
            "Step3p7Experts",
            Gate("silu", limit=2.0, limits_output=True),
            {"swiglu_limit": 2.0},
        ),
    ],
)
def test_gates_of_transformers(
    family: str, experts: str, gate: Gate, options: dict[str, float]
) -> None:
    from importlib import import_module
    from types import SimpleNamespace

    from torch.nn import functional as F
    from transformers.activations import ACT2FN

    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    module = SimpleNamespace(act_fn=ACT2FN["silu"], **options)
    module.limit, module.alpha = options.get("swiglu_limit"), options.get("swiglu_alpha")
    if family == "inkling2":
        module.act_fn = modeling.Inkling2SoftcappedSwiGLU(SimpleNamespace(**options))
    x = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    given = x if family != "gpt_oss" else torch.stack(x.chunk(2, -1), -1).flatten(-2)
    expected = getattr(modeling, experts)._apply_gate(module, given)
    torch.testing.assert_close(reference.gated(gate, x), expected)
    g, u = x.chunk(2, -1)
    assert not torch.allclose(expected, F.silu(g) * u)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("family", ["int", "trellis"])
@pytest.mark.parametrize("name", GATES)
def test_experts(name: str, family: str, biases: tuple[bool, bool]) -> None:
    call = gated_call(GATES[name], family, biases=biases)
    y = kernels.experts(*op_arguments(call))
    exact = experts_oracle(call)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    half = dataclasses.replace(call, hidden=call.hidden.bfloat16())
    y = kernels.experts(*op_arguments(half))  # biases in float32
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("which", ["gate_up_bias", "down_bias"])
def test_each_bias_counts(which: str) -> None:
    call = gated_call(GATES["gpt_oss"], biases=(True, True))
    y = reference.experts(call)
    assert not torch.allclose(reference.experts(dataclasses.replace(call, **{which: None})), y)


@pytest.mark.usefixtures("reference_backend")
def test_nan_and_infinities() -> None:
    """A limit bounds infinities and keeps NaN, as clamp does."""
    x = torch.tensor([torch.nan, 1.0, torch.inf, 1.0, 1.0, torch.nan, 2.0, -torch.inf])
    got = reference.gated(Gate("silu", limit=2.0), x)
    silu = torch.nn.functional.silu(torch.tensor([1.0, 2.0]))
    assert got[:2].isnan().all()
    torch.testing.assert_close(got[2:], torch.stack([2 * silu[1], -2 * silu[0]]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"limit": 0.0}, "limit of a gate is 0.0"),
        ({"limit": math.nan}, "limit of a gate is nan"),
        ({"up_softcap": -1.0}, "up_softcap of a gate is -1.0"),
        ({"alpha": math.inf}, "alpha of a gate is inf"),
        ({"activation": "relu", "alpha": 2.0}, "belong to 'silu'"),
        ({"gated": False, "up_offset": 1.0}, "no second factor"),
    ],
)
def test_gates_that_are_none(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gate(**{"activation": "silu", **fields})
    call = dataclasses.replace(gated_call(Gate("silu")), **fields)
    with pytest.raises(InputError, match=message):
        kernels.experts(*op_arguments(call))


def test_the_op_refuses_biases_that_do_not_fit() -> None:
    call = gated_call(GATES["nemotron_h"], biases=(True, True))
    assert call.gate_up_bias is not None and call.gate_up_bias.shape == (5, 96)
    for field, wrong in (
        ("gate_up_bias", torch.zeros(5, 192)),
        ("gate_up_bias", torch.zeros(96)),
        ("down_bias", torch.zeros(4, 64)),
        ("down_bias", torch.zeros(5, 64).int()),
    ):
        with pytest.raises(InputError, match=rf"{field} must be \[5, (96|64)\] of floats"):
            kernels.experts(*op_arguments(dataclasses.replace(call, **{field: wrong})))
    # Not through the op: with a meta tensor it runs its fake, and there is no other device here.
    away = dataclasses.replace(call, down_bias=call.down_bias.to("meta"))
    with pytest.raises(InputError, match="down_bias is on meta, the input on cpu"):
        check_experts_call(away)


def test_as_torch_ops() -> None:
    for name, family in (("gpt_oss", "trellis"), ("nemotron_h", "int")):
        call = gated_call(GATES[name], family, biases=(True, True))
        torch.library.opcheck(kernels.experts.op, op_arguments(call))
    # What a schema cannot state as a default: None is inf.
    *args, limits_output, gate_softcap, up_softcap, _, _ = op_arguments(call)
    assert (limits_output, gate_softcap, up_softcap) == (False, math.inf, math.inf)
    assert torch.equal(kernels.experts(*args), kernels.experts(*args, False, None, None))


# The module


def packed_experts(name: str, **biases: bool) -> tuple[PackedExperts, tuple[Tensor, ...], Tensor]:
    """A module, the arguments of a call, and the result by the reference."""
    gate = GATES[name]
    call = gated_call(gate, biases=(len(biases) > 0, len(biases) > 0))
    gate_up, down = (PackedSpec(widths, 32) for widths in WIDTHS["int"])
    module = PackedExperts(5, 64, 96, gate_up, down, gate, **biases)
    first = "gate_up_proj" if gate.gated else "up_proj"
    state = {first: call.gate_up, "down_proj": call.down}
    if biases:
        state |= {f"{first}_bias": call.gate_up_bias, "down_proj_bias": call.down_bias}
    module.load_state_dict(state)
    args = call.hidden, call.top_k_index, call.top_k_weights
    return module, args, reference.experts(call)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "inkling2"])
def test_modules(name: str) -> None:
    module, args, expected = packed_experts(name, gate_up_bias=True, down_bias=True)
    with torch.no_grad():
        assert torch.equal(module(*args), expected)
        half = copy.deepcopy(module).bfloat16()
        assert half.down_proj_bias.dtype == torch.bfloat16
        assert half.first_proj.dtype == torch.uint8
        y = half(args[0].bfloat16(), *args[1:])
        assert (y - expected).norm() < 0.05 * expected.norm()
    meta = module.to("meta")
    assert meta(*(a.to("meta") for a in args)).shape == expected.shape


def test_modules_without_a_gate_have_up_proj() -> None:
    module, _, _ = packed_experts("nemotron_h")
    assert set(module.state_dict()) == {"up_proj", "down_proj"}
    assert module.first_proj is module.up_proj
    assert module.first_proj.shape == (PackedSpec(WIDTHS["int"][0], 32).nbytes(96, 64),)
    assert "gate=relu2, gated=False," in repr(module)
    spec, other = PackedSpec((2, 0), 32), PackedSpec((2, 2), 32)
    with pytest.raises(InputError, match="bits in up_proj and down_proj"):
        PackedExperts(2, 64, 96, spec, other, Gate("silu", gated=False))


def test_modules_compile_to_one_graph() -> None:
    module, args, _ = packed_experts("gpt_oss", gate_up_bias=True, down_bias=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*args), module(*args))
    torch._dynamo.reset()
