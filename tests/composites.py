"""Tiny composite models: a language model with experts, and towers for other inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moepress.original.skeleton import auto_class

IMAGE = 380  # token that stands for a part of an image
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
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
HALF_MROPE = {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
QWEN_EXPERTS = {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
QWEN_VISION = {
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
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 381,
    "vision_start_token_id": 382,
    "vision_end_token_id": 383,
}
GLM_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 381,
    "image_start_token_id": 382,
    "image_end_token_id": 383,
    "video_start_token_id": 378,
    "video_end_token_id": 379,
}
# Latent attention, experts with a bias of their choice, and shared ones.
DEEPSEEK = {
    **TEXT,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
PIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 4,
}
MIXTRAL = {
    **TEXT,
    "model_type": "mixtral",
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "mlp_dim": 48,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Composite:
    """How to make a tiny composite, and a prompt with an image for it."""

    config: dict[str, Any]
    image: Callable[[], dict[str, torch.Tensor]]
    model_type: str | None = None  # None: the name of the entry


def prompt(count: int, before: int = 382, after: int = 383) -> torch.Tensor:
    """Token ids [1, 6 + count] of a text with an image of `count` tokens."""
    return torch.tensor([[5, 6, before, *[IMAGE] * count, after, 7, 8]])


def patches(
    width: int, rows: int = 4, columns: int = 4, *, types: bool = True, merged: int = 2
) -> Callable[[], dict[str, torch.Tensor]]:
    """An image as a grid of patches of `width` numbers; `merged`^2 of them make a token."""

    def make() -> dict[str, torch.Tensor]:
        ids = prompt(rows * columns // merged**2)
        found = {
            "input_ids": ids,
            "pixel_values": _random(rows * columns, width),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
        return found | ({"mm_token_type_ids": (ids == IMAGE).int()} if types else {})

    return make


def pixels(size: int, tokens: int, **more: torch.Tensor) -> Callable[[], dict[str, torch.Tensor]]:
    """An image as `size` x `size` pixels, which takes `tokens` tokens."""

    def make() -> dict[str, torch.Tensor]:
        return {"input_ids": prompt(tokens), "pixel_values": _random(1, 3, size, size), **more}

    return make


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ernie_image() -> dict[str, torch.Tensor]:
    ids = prompt(4)
    types = (ids == IMAGE).int()
    return {
        "input_ids": ids,
        "pixel_values": _random(16, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": types,
        "moe_mm_token_type_ids": (ids >= IMAGE).int(),
    }


COMPOSITES: dict[str, Composite] = {
    "qwen3_vl_moe": Composite(
        {
            "text_config": {
                **TEXT,
                **QWEN_EXPERTS,
                "intermediate_size": 96,
                "rope_parameters": MROPE,
            },
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        },
        patches(96),
    ),
    "qwen3_5_moe": Composite(
        {
            "text_config": {
                **TEXT,
                **QWEN_EXPERTS,
                "shared_expert_intermediate_size": 32,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "rope_parameters": HALF_MROPE,
            },
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": []},
            **QWEN_TOKENS,
        },
        patches(96),
    ),
    "qwen3_omni_moe_thinker": Composite(
        {
            "text_config": {
                **TEXT,
                **QWEN_EXPERTS,
                "intermediate_size": 96,
                "rope_parameters": MROPE,
            },
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "num_mel_bins": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 32,
                "max_source_positions": 40,
                "n_window": 10,
                "output_dim": 64,
                "downsample_hidden_size": 8,
            },
            "image_token_id": IMAGE,
            "video_token_id": 381,
            "audio_token_id": 379,
            "audio_start_token_id": 378,
            "vision_start_token_id": 382,
        },
        patches(96, types=False),
    ),
    "glm4v_moe": Composite(
        {
            "text_config": {
                **DEEPSEEK,
                "num_key_value_heads": 2,
                "rope_parameters": HALF_MROPE,
            },
            "vision_config": {**QWEN_VISION, "image_size": 16},
            **GLM_TOKENS,
        },
        patches(96),
    ),
    "kimi_k25": Composite(
        {
            "text_config": {**DEEPSEEK, "model_type": "deepseek_v3", "first_k_dense_replace": 1},
            "vision_config": {
                "patch_size": 4,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
            },
            "projection_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": 381,
            "tie_word_embeddings": False,
        },
        lambda: {**patches(48, types=False)(), "pixel_values": _random(16, 3, 4, 4)},
    ),
    "mistral3": Composite(
        {
            "text_config": {
                key: value
                for key, value in {**DEEPSEEK, "model_type": "mistral4"}.items()
                if key != "head_dim"
            },
            "vision_config": {**PIXTRAL, "model_type": "pixtral"},
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        pixels(16, 4, image_sizes=torch.tensor([[16, 16]])),
    ),
    "mistral_large4": Composite(
        {
            "text_config": {
                **DEEPSEEK,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "index_topk": 64,
            },
            "vision_config": {**PIXTRAL, "model_type": "pixtral"},
            "image_token_index": IMAGE,
        },
        pixels(16, 4, image_sizes=torch.tensor([[16, 16]])),
    ),
    "ernie4_5_vl_moe": Composite(
        {
            "text_config": {
                **TEXT,
                "intermediate_size": 96,
                "moe_intermediate_size": [64, 32],
                "moe_k": 2,
                "moe_num_experts": 4,
                "moe_num_shared_experts": 1,
                "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
            },
            "vision_config": {**QWEN_VISION, "hidden_size": 32},
            "image_token_id": IMAGE,
            "video_token_id": 381,
            "image_start_token_id": 382,
            "image_end_token_id": 383,
            "video_start_token_id": 378,
            "video_end_token_id": 379,
        },
        ernie_image,
    ),
    "dots3_note": Composite(
        {
            "text_config": {
                **DEEPSEEK,
                "shared_experts_intermediate_size": 32,
                "index_head_dim": 32,
                "index_n_heads": 2,
                "index_topk": 64,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "moe_intermediate_size": 32,
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 4,
                "adapter_in_dim": 32,
                "adapter_out_dim": 64,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "feature_size": 16,
                "downsample_hidden_size": 8,
                "adapter_input_size": 32,
                "adapter_out_dim": 64,
                "conv_output_size": 16,
            },
            "image_token_id": IMAGE,
            "video_token_id": 381,
            "audio_token_id": 379,
        },
        patches(3 * 4 * 4, types=False),
    ),
    "gemma4": Composite(
        {
            "text_config": {
                **TEXT,
                "intermediate_size": 96,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
                "layer_types": ["sliding_attention", "full_attention"],
                "per_layer_config": {},
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 384,
                "sliding_window": 16,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "image_token_id": IMAGE,
            "video_token_id": 381,
            "audio_token_id": 379,
            "boi_token_id": 382,
            "eoi_token_id": 383,
        },
        lambda: {
            "input_ids": prompt(4),
            "pixel_values": _random(1, 16, 48),
            "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
            "mm_token_type_ids": (prompt(4) == IMAGE).int(),
        },
    ),
    "llava": Composite(
        {
            "text_config": MIXTRAL,
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "projection_dim": 32,
            },
            "image_token_index": IMAGE,
        },
        pixels(16, 16),
    ),
    "deepseek_ocr2": Composite(
        {
            "text_config": {
                **DEEPSEEK,
                "num_key_value_heads": 4,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "vision_config": {
                "sam_config": {**SAM, "downsample_channels": [24, 32]},
                "encoder_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "vocab_size": 16,
                },
            },
            "image_token_id": IMAGE,
        },
        pixels(64, 145),
    ),
}


def make(family: str, seed: int = 0) -> Any:
    """A composite with random weights, large enough to make experts differ."""
    from transformers import AutoConfig

    torch.manual_seed(seed)
    composite = COMPOSITES[family]
    config = AutoConfig.for_model(composite.model_type or family, **composite.config)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model
