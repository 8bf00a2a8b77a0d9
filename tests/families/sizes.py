"""Tiny values for the fields that configs of transformers' models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCAB = 384  # entries of the tests' tokenizer
LAYERS = 3  # a dense layer, where a family begins with one, and two with experts
EXPERTS, CHOSEN = 4, 2

# Each is used where the family's config has a field of this name. Rows of 32 weights fill a group.
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "router_jitter_noise": 0.0,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "num_attention_heads_per_layer": [4] * LAYERS,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "rel_extent": 32,
    "layer_rope_theta": [10000.0] * LAYERS,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # attention to indexed tokens
    "index_topk": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    # linear attention, Mamba, convolutions
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "block_size": 16,
    "use_mamba_kernels": False,
    # dense MLPs and shared experts
    "intermediate_size": 64,
    "dense_intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "shared_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "share_expert_dim": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    # routed experts
    "moe_intermediate_size": 32,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "num_experts_per_token": CHOSEN,
    "moe_topk": CHOSEN,
    "moe_k": CHOSEN,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    # multi-token prediction is not part of a causal LM in transformers
    "num_nextn_predict_layers": 0,
}

DROP = object()  # as a changed value: leave the field at the config's default


def tiny_fields(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a tiny config of a class.

    Args:
        defaults: all fields of the class with their default values.
        changes: fields of this family that `SIZES` does not name, or names otherwise.
    """
    fields = {name: value for name, value in SIZES.items() if name in defaults}
    layers = changes.get("num_hidden_layers", LAYERS)
    for name in ("layer_types", "mlp_layer_types", "indexer_types"):
        if defaults.get(name):
            fields[name] = some_of_each(defaults[name], layers)
    return {n: v for n, v in (fields | dict(changes)).items() if v is not DROP}


def some_of_each(kinds: list[str], layers: int) -> list[str]:
    """The kinds of layers in their order of appearance; the last one again until all are given."""
    distinct = list(dict.fromkeys(kinds))[:layers]
    return distinct + [distinct[-1]] * (layers - len(distinct))
