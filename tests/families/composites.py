"""A tiny configuration of every composite of transformers whose text part has routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.families.causal import CAUSAL, MLA, QWEN4_EXP
from tests.families.sizes import CHOSEN, DROP, EXPERTS

IMAGE, VIDEO, AUDIO = 380, 381, 382  # placeholder tokens, inside the tests' vocabulary

# As sizes.SIZES, for encoders of images and sound.
ENCODER_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "position_embedding_size": 64,
    # sound
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "downsample_hidden_size": 16,
    "n_window": 10,
}


@dataclass(frozen=True)
class Composite:
    """Fields of a composite's parts that are not set, or set otherwise, by the tables of sizes."""

    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    audio: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)  # beside the parts


INKLING2_VISION = {"text_hidden_size": 64, "projection_hidden_dim": 32}
SAM = {  # encoder_config is an encoder of the tables' sizes
    "sam_config": {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "mlp_dim": 32,
        "global_attn_indexes": [1],
        "window_size": 2,
        "downsample_channels": [32, 32],
        "initializer_range": 0.02,
    }
}


def rope(*sections: int, **more: float) -> dict[str, Any]:
    """Rotary embedding whose frequencies are divided among time, height and width."""
    made = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {"rope_parameters": made}


COMPOSITES: Mapping[str, Composite] = {
    "aria": Composite(vision={"image_size": 64}, own={"projector_patch_to_query_dict": {4: 4}}),
    "deepseek_ocr2": Composite(
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": CHOSEN},
        vision=SAM,
    ),
    "dots3_note": Composite(
        CAUSAL["dots3_note_text"],
        vision={
            "mlp_layer_types": ["dense", "sparse"],
            "moe_intermediate_size": 32,
            "per_layer_config": {1: {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}},
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        audio={"adapter_input_size": 32, "adapter_out_dim": 64, "feature_size": 16},
    ),
    "ernie4_5_vl_moe": Composite({"moe_intermediate_size": [32, 32], **rope(3, 3, 2)}),
    "gemma4": Composite(
        CAUSAL["gemma4_text"],
        own={
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "position_embedding_size": 64,
            }
        },
    ),
    "glm4v_moe": Composite(rope(2, 1, 1, partial_rotary_factor=0.5)),
    "glm5_next": Composite(
        MLA | {"qk_rope_head_dim": 0, "head_dim": DROP, "hc_mult": 2},
        vision={"projection_intermediate_size": 32},
    ),
    "hy_v4_vl": Composite(CAUSAL["hy_v4"] | rope(4, 2, 2)),
    "inkling2": Composite(CAUSAL["inkling2_text"], vision=INKLING2_VISION),
    "inkling2_loop": Composite(CAUSAL["inkling2_loop_text"], vision=INKLING2_VISION),
    "inkling_mm_model": Composite(
        CAUSAL["inkling_text"],
        vision={"num_hidden_layers": 2, "patch_size": 8, "text_hidden_size": 64},
        audio={"n_mel_bins": 16, "mel_vocab_size": 16, "text_hidden_size": 64},
    ),
    "kimi_k25": Composite(CAUSAL["deepseek_v3"], own={"projection_hidden_size": 32}),
    "llama4": Composite(
        CAUSAL["llama4_text"],
        vision={
            "intermediate_size": 128,  # four patches become one
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    ),
    "minimax_m3_vl": Composite(
        CAUSAL["minimax_m3_vl_text"], own={"projector_hidden_size": 32, "merged_hidden_size": 128}
    ),
    "mistral_large4": Composite(MLA, vision={"image_size": 64}),
    "muse_spark": Composite(
        {"moe_hidden_size": 32, "layer_rope_theta": [10000.0, 0, 10000.0]},
        audio={
            "num_hidden_layers": 2,
            "patch_sizes": [4, 4],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "out_hidden_size": 64,
        },
        own={"out_hidden_size": 128, "projector_hidden_size": 32},
    ),
    "nemotron_h_omni": Composite(
        CAUSAL["nemotron_h"],
        vision={"video_temporal_patch_size": 2, "max_img_size": 64, "image_size": 32},
        own={"vision_hidden_size": 32, "projector_hidden_size": 32},
    ),
    "qwen3_5_moe": Composite(),
    "qwen3_omni_moe_thinker": Composite(rope(3, 3, 2), own={"vision_start_token_id": 7}),
    "qwen3_vl_moe": Composite(rope(3, 3, 2)),
    "qwen4_exp": Composite(QWEN4_EXP),
    "step3p7": Composite(),
    "unlimited_ocr": Composite(vision=SAM),
}
# Text models that AutoModelForCausalLM does not open. Their head_dim follows from others.
TEXT_ONLY: Mapping[str, Mapping[str, Any]] = {"mistral4": MLA | {"head_dim": DROP}}
