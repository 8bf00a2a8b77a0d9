"""A tiny configuration of every composite of transformers whose text part has routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.families.causal import CAUSAL, MLA, QWEN4_EXP
from tests.families.sizes import DROP

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


COMPOSITES: Mapping[str, Composite] = {
    "aria": Composite(),
    "deepseek_ocr2": Composite(),
    "diffusion_gemma": Composite(
        CAUSAL["gemma4_text"] | {"enable_moe_block": DROP, "hidden_size_per_layer_input": DROP}
    ),
    "dots3_note": Composite(CAUSAL["dots3_note_text"]),
    "ernie4_5_vl_moe": Composite({"moe_intermediate_size": [32, 32]}),
    "gemma4": Composite(CAUSAL["gemma4_text"]),
    "glm4v_moe": Composite(),
    "glm5_next": Composite(MLA | {"qk_rope_head_dim": 0, "head_dim": DROP, "hc_mult": 2}),
    "hy_v4_vl": Composite(CAUSAL["hy_v4"]),
    "inkling2": Composite(CAUSAL["inkling2_text"]),
    "inkling2_loop": Composite(CAUSAL["inkling2_loop_text"]),
    "inkling_mm_model": Composite(CAUSAL["inkling_text"]),
    "kimi_k25": Composite(CAUSAL["deepseek_v3"]),
    "llama4": Composite(CAUSAL["llama4_text"]),
    "minimax_m3_vl": Composite(CAUSAL["minimax_m3_vl_text"]),
    "mistral_large4": Composite(MLA),
    "muse_spark": Composite(),
    "nemotron_h_omni": Composite(CAUSAL["nemotron_h"]),
    "qwen3_5_moe": Composite(CAUSAL["qwen3_5_moe_text"]),
    "qwen3_omni_moe_thinker": Composite(),
    "qwen3_vl_moe": Composite(),
    "qwen4_exp": Composite(QWEN4_EXP),
    "step3p7": Composite(),
    "unlimited_ocr": Composite(),
}
# Text models that AutoModelForCausalLM does not open.
TEXT_ONLY: Mapping[str, Mapping[str, Any]] = {"mistral4": MLA}
