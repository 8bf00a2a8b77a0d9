"""Tiny composite models: a language model with experts, and towers for other inputs."""

from __future__ import annotations

from typing import Any

import torch

from moepress.original.skeleton import auto_class

TEXT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
COMPOSITES: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "text_config": {
            **TEXT,
            "intermediate_size": 96,
            "moe_intermediate_size": 96,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        "image_token_id": 380,
        "video_token_id": 381,
        "vision_start_token_id": 382,
        "vision_end_token_id": 383,
    },
    "qwen3_5_moe": {
        "text_config": {
            **TEXT,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": []},
        "image_token_id": 380,
        "video_token_id": 381,
        "vision_start_token_id": 382,
        "vision_end_token_id": 383,
    },
}


def qwen_image(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A prompt with one image of 4 x 4 patches, which takes 4 tokens."""
    ids = torch.tensor([[5, 6, 382, 380, 380, 380, 380, 383, 7, 8]])
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 380).int(),
    }


IMAGES = {"qwen3_vl_moe": qwen_image, "qwen3_5_moe": qwen_image}


def make(family: str, seed: int = 0) -> Any:
    """A composite with random weights, large enough to make experts differ."""
    from transformers import AutoConfig

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **COMPOSITES[family])
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model
