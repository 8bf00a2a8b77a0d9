"""Experts are found by what they are, and every linear has the right role."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from moepress.original.architectures import find_experts, linear_role
from moepress.original.skeleton import skeleton

FOUND = {  # default configs, on meta: layers with experts, experts, rows of gate and up, hidden
    "mixtral": (32, 8, 28672, 4096),
    "qwen3_moe": (24, 128, 1536, 2048),
    "deepseek_v3": (58, 256, 4096, 7168),
    "jamba": (16, 16, 28672, 4096),
    "granitemoehybrid": (32, 8, 22016, 4096),
    "olmoe": (16, 64, 4096, 2048),
}


@pytest.mark.parametrize("family", FOUND)
def test_experts_are_found(family: str) -> None:
    experts = find_experts(skeleton(AutoConfig.for_model(family), torch.bfloat16))
    one = next(iter(experts.values()))
    assert (len(experts), one.experts, one.gate_up_shape[0], one.hidden) == FOUND[family]


@pytest.mark.parametrize(
    ("path", "in_moe_layer", "role"),
    [
        ("self_attn.q_proj", True, "attention"),
        ("self_attn.kv_a_proj_with_mqa", False, "attention"),
        ("self_attn.forget_gate.f_proj", True, "attention"),
        ("linear_attn.in_proj_qkvz", True, "attention"),
        ("mamba.in_proj", False, "attention"),
        ("mlp.gate_proj", False, "dense_mlp"),
        ("feed_forward.down_proj", False, "dense_mlp"),
        ("mlp.shared_experts.gate_proj", True, "shared_expert"),
        ("mlp.shared_expert.down_proj", True, "shared_expert"),
        ("shared_mlp.input_linear", True, "shared_expert"),
        ("mlp.gate_proj", True, "shared_expert"),
        ("mlp.gate", True, None),
        ("mlp.router.gate", True, None),
        ("mlp.gate.router_mlp.fc1", True, None),
        ("mlp.shared_expert_gate", True, None),
        ("input_layernorm.mlp.fc1", False, None),
        ("self_attn.indexer.wq_b", True, None),
        ("mamba.dt_proj", False, None),
    ],
)
def test_roles(path: str, in_moe_layer: bool, role: str | None) -> None:
    assert linear_role(path, in_moe_layer) == role
