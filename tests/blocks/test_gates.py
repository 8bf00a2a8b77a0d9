"""Gates are recognised by what they compute, whatever an experts module is called."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moepress.blocks.gates import gate_of
from moepress.kernels.gate import Gate
from moepress.kernels.reference import ACTIVATIONS
from moepress.original.architectures import find_experts
from tests.families.models import model_class, tiny_config

OF_FAMILIES = {
    "aria_text": Gate("silu"),
    "beam": Gate("silu"),
    "gpt_oss": Gate("silu", limit=7.0, alpha=1.702, up_offset=1.0),
    "hy_v4": Gate("silu", limit=10.0),
    "inkling2_text": Gate("silu", gate_softcap=4.0, up_softcap=25.0),
    "llama4_text": Gate("silu"),
    "minimax_m3_vl_text": Gate("silu", limit=7.0, alpha=1.702, up_offset=1.0),
    "nemotron_h": Gate("relu2", gated=False),
}


class Experts(nn.Module):
    """As transformers' default."""

    has_gate = True

    def __init__(self, act_fn: object) -> None:
        super().__init__()
        self.act_fn = act_fn

    def _apply_gate(self, first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        return self.act_fn(gate) * up  # type: ignore[operator]


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_the_gates_of_families(family: str) -> None:
    with torch.device("meta"):
        model = model_class(family)._from_config(tiny_config(family))
    for experts in find_experts(model).values():
        assert gate_of(model.get_submodule(experts.path)) == OF_FAMILIES[family]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    with torch.device("meta"):  # where models are when their modules are exchanged
        module = Experts(ACT2FN[name])
    assert gate_of(module) == Gate(name)
    module.has_gate = False  # type: ignore[assignment]
    assert gate_of(module) == Gate(name, gated=False)


@pytest.mark.parametrize("name", ["leaky_relu", "gelu_10", "relu6", "prelu", "linear"])
def test_other_activations_are_no_gate(name: str) -> None:
    assert gate_of(Experts(ACT2FN[name])) is None


def test_a_limit_that_is_an_integer_and_one_that_is_off() -> None:
    class Limited(Experts):
        def __init__(self, limit: float) -> None:
            super().__init__(ACT2FN["silu"])
            self.swiglu_limit = limit

        def _apply_gate(self, first: Tensor) -> Tensor:
            gate, up = first.chunk(2, dim=-1)
            gate, up = (
                gate.clamp(max=self.swiglu_limit),
                up.clamp(-self.swiglu_limit, self.swiglu_limit),
            )
            return self.act_fn(gate) * up  # type: ignore[operator]

    assert gate_of(Limited(7)) == Gate("silu", limit=7.0)
    assert gate_of(Limited(math.inf)) == Gate("silu")
