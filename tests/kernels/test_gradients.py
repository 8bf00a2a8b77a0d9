"""Gradients of the ops against autograd on the weights that they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress import kernels
from moepress.format.codec import LEFT_OUT, Codec
from moepress.kernels import reference
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gradients import experts_by_slots
from moepress.kernels.modules import PackedExperts, PackedLinear
from tests.kernels import test_kernels
from tests.kernels.gates import GATES, gated_call
from tests.rounding import test_trellis

pytestmark = pytest.mark.usefixtures("reference_backend")  # activations are not rounded

CODECS = [Codec(b, 32) for b in (1, 3, 8)] + [Codec(b, 32, "trellis") for b in (1, 2.5, 4)]
TRAINED = ("hidden", "top_k_weights", "gate_up_bias", "down_bias")


def random_packed(rows: int, cols: int, codec: Codec) -> Tensor:
    make = test_trellis if codec.family == "trellis" else test_kernels
    return make.random_packed(rows, cols, codec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(2, 5), (), (0,)])
def test_a_linear_has_the_gradient_of_its_weights(
    codec: Codec, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    rows, cols = 70, 96
    packed = random_packed(rows, cols, codec)
    module = PackedLinear(cols, rows, codec, bias=True).to(dtype)
    module.weight.copy_(packed)
    x, bias = torch.randn(*shape, cols, dtype=dtype), module.bias
    weight = reference.dequantize(packed, rows, cols, codec)
    given = torch.randn(*shape, rows, dtype=dtype)

    ours = torch.autograd.grad(module(x.requires_grad_()), (x, bias), given)
    wide = [value.detach().float().requires_grad_() for value in (x, bias)]
    exact = torch.autograd.grad(F.linear(wide[0], weight, wide[1]), wide, given.float())
    rough = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, right in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - right).norm() <= rough * right.norm()


def dense(call: ExpertsCall, hidden: Tensor, weights: Tensor, *biases: Tensor | None) -> Tensor:
    """The experts in float64, choice by choice, on the weights that the packed matrices are."""
    width, inner = call.hidden.shape[1], call.intermediate_size
    first, second = biases
    result = []
    for x, chosen, w in zip(hidden, call.top_k_index.tolist(), weights, strict=True):
        y = torch.zeros_like(x)
        for place, expert in enumerate(chosen):
            if not 0 <= expert < len(call.gate_up_table):
                continue
            if call.gate_up_table[expert, 1] == LEFT_OUT:
                continue
            up = matrix(call, call.gate_up, call.gate_up_table[expert], call.rows, width)
            down = matrix(call, call.down, call.down_table[expert], width, inner)
            h = reference.gated(
                call.gate, F.linear(x, up, None if first is None else first[expert])
            )
            y = y + w[place] * F.linear(h, down, None if second is None else second[expert])
        result.append(y)
    return torch.stack(result)


def matrix(call: ExpertsCall, packed: Tensor, entry: Tensor, rows: int, cols: int) -> Tensor:
    first, codec = int(entry[0]), Codec(int(entry[1]), 32, call.family)
    held = packed[first : first + codec.nbytes(rows, cols)]
    return reference.dequantize(held, rows, cols, codec).double()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gate", ["plain", "nemotron_h", "everything"])
@pytest.mark.parametrize("family", ["int", "trellis"])
def test_experts_have_the_gradients_of_their_weights(family: str, gate: str, biased: bool) -> None:
    call = gated_call(GATES[gate], family, biases=(biased, biased), size=2.0)
    table = call.gate_up_table.clone(), call.down_table.clone()
    table[0][1, 1] = table[1][1, 1] = LEFT_OUT  # expert 1
    call = dataclasses.replace(call, gate_up_table=table[0], down_table=table[1])
    given = torch.randn(call.hidden.shape, generator=torch.Generator().manual_seed(3))

    names = [name for name in TRAINED if getattr(call, name) is not None]
    ours = {name: getattr(call, name).clone().requires_grad_() for name in names}
    y = kernels.experts(*op_arguments(dataclasses.replace(call, **ours)))
    wide = {name: getattr(call, name).double().requires_grad_() for name in names}
    right = dense(call, *(wide.get(name) for name in TRAINED))
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experts_by_slots(call), y)

    found = torch.autograd.grad(y, [*ours.values()], given)
    expected = torch.autograd.grad(right, [*wide.values()], given.double())
    for name, mine, exact in zip(names, found, expected, strict=True):
        assert mine.dtype == getattr(call, name).dtype
        assert exact.norm() > 0
        assert (mine - exact).norm() < 1e-4 * exact.norm(), name


def op_arguments(call: ExpertsCall) -> list[object]:
    """In the order of the op; it takes None for infinity."""
    given = [getattr(call, field.name) for field in dataclasses.fields(call)]
    return [None if isinstance(v, float) and v == float("inf") else v for v in given]


@pytest.mark.parametrize("renormalise", [False, True])
def test_dropping_has_the_gradient_of_the_kept_weights(renormalise: bool) -> None:
    torch.manual_seed(0)
    index, weights = torch.rand(6, 4).topk(3).indices, torch.rand(6, 3)
    rest = torch.tensor([0, 0.6, 0.9]), renormalise, None, 4
    given = torch.randn(6, 3)
    one, two = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    _, kept, dropped = kernels.drop(index, one, *rest)
    _, right, _ = reference.drop(index, two, *rest)
    assert dropped.any() and not dropped.all()
    (ours,) = torch.autograd.grad(kept, one, given)
    (exact,) = torch.autograd.grad(right, two, given)
    torch.testing.assert_close(ours, exact)


def test_a_compiled_layer_has_the_same_gradients() -> None:
    call = gated_call(GATES["plain"])
    experts = PackedExperts(5, 64, 96, *test_kernels.make_case().specs, GATES["plain"])
    for parameter, packed in zip(
        experts.parameters(), test_kernels.make_case().packed, strict=True
    ):
        parameter.copy_(packed)
    router, linear = nn.Linear(64, 5), PackedLinear(64, 64, Codec(3, 32))
    linear.weight.copy_(random_packed(64, 64, Codec(3, 32)))
    layer = nn.ModuleDict({"router": router, "linear": linear, "experts": experts})

    def forward(x: Tensor) -> Tensor:
        weights, index = layer["router"](x).softmax(-1).topk(3)
        return layer["linear"](x) + layer["experts"](x, index, weights)

    found = []
    for run in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        x = call.hidden.clone().requires_grad_()
        found.append(torch.autograd.grad(run(x).square().sum(), (x, router.weight)))
    torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
