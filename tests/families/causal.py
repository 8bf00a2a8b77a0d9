"""A tiny configuration of every Mixture-of-Experts causal LM of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.sizes import CHOSEN, DROP, EXPERTS

MLA = {"num_key_value_heads": 4}  # latent attention has as many as there are heads

QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_count": 2,
    "hc_lowrank": 16,
}

# By model type: fields that sizes.SIZES does not set, or sets otherwise.
CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": MLA,
    "beam": {},
    "cohere2_moe": {},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": EXPERTS,
            "moe_top_k": CHOSEN,
        },
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 32,
        "hc_mult": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "doge": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": CHOSEN},
    "dots3_note_text": MLA
    | {
        "head_dim": 32,
        "per_layer_config": {
            layer: {"kv_lora_rank": 64, "qk_nope_head_dim": 16, "num_attention_heads": 4}
            for layer in (1, 2)
        },
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": CHOSEN,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
    },
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": MLA,
    # blocks of one layer, whose states later layers read; layer 1 runs twice
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "inkling_text": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "jetmoe": {"kv_channels": 16},
    "kimi_linear": MLA,
    "kolibri1": {},
    "laguna": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "lara_mini": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "num_key_value_heads": 4,
    },
    "mellum": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "rotary_dim": 8,
    },
    "mixtral": {},
    "nemotron_h": {
        "num_hidden_layers": DROP,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen4_exp_text": QWEN4_EXP,
    "sarvam_mla": MLA,
    "sarvam_moe": {},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
