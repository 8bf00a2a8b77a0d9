"""Models of published shapes with random codes: compressed folders, and GGUF files beside them.

Nothing is compressed, so results say nothing about quality. All layers hold the same bytes, but for
routers, each in its own file.

    python benchmarks/random_models.py OUT --layers 32    # compressed, Mixtral-8x7B's shape
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, under the names that its config has."""

    model_type: str  # of transformers
    gguf: str  # architecture of llama.cpp
    layers: int
    hidden: int
    intermediate: int  # of an expert
    experts: int
    chosen: int  # experts of a token
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head_norms: bool  # queries and keys are normalized, head by head

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the config whose names differ from family to family."""
        if self.model_type == "mixtral":
            return {"intermediate_size": self.intermediate, "num_local_experts": self.experts}
        return {
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "norm_topk_prob": True,
        }


SHAPES: Mapping[str, Shape] = {
    "Mixtral-8x7B": Shape(
        "mixtral", "llama", 32, 4096, 14336, 8, 2, 32, 8, 128, 32000, head_norms=False
    ),
    "Qwen3-30B-A3B": Shape(
        "qwen3_moe", "qwen3moe", 48, 2048, 768, 128, 8, 32, 4, 128, 151936, head_norms=True
    ),
}
MIXTRAL = SHAPES["Mixtral-8x7B"]
ROPE_THETA, EPSILON = 1e6, 1e-5


def router(shape: Shape, layer: int, skew: float) -> torch.Tensor:
    """[E, H] bfloat16: rows of norms from (1 + skew) to (1 - skew) times sqrt(H), in random order.

    An expert of a larger norm is chosen more often.
    """
    generator = torch.Generator().manual_seed(layer if skew else 0)
    rows = torch.empty(shape.experts, shape.hidden).normal_(generator=generator)
    norms = torch.linspace(1 + skew, 1 - skew, shape.experts)
    return (rows * norms[torch.randperm(shape.experts, generator=generator), None]).bfloat16()


def packed(
    out: Path,
    layers: int,
    bits: float,
    family: str = "int",
    skew: float = 0,
    shape: Shape = MIXTRAL,
    gain: float = 1,
) -> None:
    """Write a compressed folder of random codes, `bits` on average, one shard per layer.

    Of the experts of a layer, some have the next width below `bits`, the others the next above.
    Attention, head and embedding have 4 bits.

    Args:
        family: of the codes of experts and attention: "int" as in `fast`, "trellis" as in
            `default`.
        skew: of the routers, see `router`.
        gain: of the embedding. With a large one, states depend on their own token more than on the
            layers, whose random weights take all of them to one direction.
    """
    from transformers import AutoConfig

    from moepress.format.checkpoint import (
        finish_folder,
        load_json,
        quantization_config,
        save_tensors,
        shard_name,
    )
    from moepress.format.codec import PackedSpec

    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    below = int(bits)
    above = round((bits - below) * shape.experts)
    widths = (below,) * (shape.experts - above) + (below + 1,) * above
    experts = PackedSpec(widths, 128, family)
    attention, four = PackedSpec((4,), 128, family), PackedSpec((4,), 128)
    hidden, whole, side = shape.hidden, *_attention_rows(shape)
    ones = torch.ones(hidden, dtype=torch.bfloat16)

    parts = {  # of one layer
        "self_attn.q_proj.weight": (attention, whole, hidden),
        "self_attn.k_proj.weight": (attention, side, hidden),
        "self_attn.v_proj.weight": (attention, side, hidden),
        "self_attn.o_proj.weight": (attention, hidden, whole),
        "mlp.experts.gate_up_proj": (experts, 2 * shape.intermediate, hidden),
        "mlp.experts.down_proj": (experts, hidden, shape.intermediate),
    }
    tensors = {name: random_packed(*part, generator) for name, part in parts.items()}
    plain = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), ones)
    if shape.head_norms:
        names = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
        plain |= dict.fromkeys(names, ones[: shape.head_dim])
    outside = "model.embed_tokens.weight", "lm_head.weight"
    specs = dict.fromkeys(outside, four)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        plain["mlp.gate.weight"] = router(shape, layer, skew)
        named = {at + name: tensor for name, tensor in (tensors | plain).items()}
        save_tensors(out / shard_name(layer), named)
        specs |= {at + name: spec for name, (spec, *_) in parts.items()}
    tables = {
        name: random_packed(four, shape.vocab, hidden, generator, times)
        for name, times in zip(outside, (gain, 1), strict=True)
    }
    save_tensors(out / shard_name(None), tables | {"model.norm.weight": ones})
    config = AutoConfig.for_model(
        shape.model_type,
        num_hidden_layers=layers,
        vocab_size=shape.vocab,
        hidden_size=hidden,
        num_experts_per_tok=shape.chosen,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=EPSILON,
        dtype="bfloat16",
        **shape.fields,
    )
    config.architectures = [
        {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[shape.model_type]
    ]
    config.save_pretrained(out)
    shards = [*map(shard_name, range(layers)), shard_name(None)]
    quantization = quantization_config(specs, {"made_by": "benchmarks/random_models.py"})
    fields = load_json(out / "config.json")
    finish_folder(out, fields, {}, quantization, [out / name for name in shards])


def _attention_rows(shape: Shape) -> tuple[int, int]:
    """Rows of the projections of queries, and of keys and values."""
    return shape.head_dim * shape.heads, shape.head_dim * shape.kv_heads


def random_packed(
    spec: Any, rows: int, cols: int, generator: torch.Generator, gain: float = 1
) -> torch.Tensor:
    """Bytes of a packed tensor: random codes and zeros, a scale that keeps products near `gain`."""
    matrices = []
    for codec in spec.codecs:
        if codec.family == "trellis":
            slabs = -(-rows // 64)
            codes = torch.randint(
                256, (slabs * codec.slab_bytes(cols),), generator=generator, dtype=torch.uint8
            )
            scales = torch.full((64 * slabs,), gain * cols**-0.5 / 100, dtype=torch.bfloat16)
            matrices.append(torch.cat([codes, scales.view(torch.uint8)]))
            continue
        size, block = codec.nbytes(rows, cols), codec.block_bytes(cols)
        matrix = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        blocks = matrix[: -(-rows // 16) * block].view(-1, block)
        first = 2 * cols * codec.bits
        scale = torch.tensor([gain * cols**-0.5 / codec.levels], dtype=torch.bfloat16)
        scales = scale.view(torch.uint8).repeat(16 * codec.groups(cols))
        blocks[:, first : first + len(scales)] = scales
        matrices.append(matrix)
    return torch.cat(matrices)


def write_gguf(
    path: Path,
    quantization: str,
    layers: int,
    skew: float = 0,
    shape: Shape = MIXTRAL,
    gain: float = 1,
) -> None:
    """Write the same shape as GGUF: experts of one type; attention, embedding and head in Q4_K.

    Args:
        skew: of the routers, see `router`.
        gain: of the embedding, see `packed`.
    """
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    types = gguf.GGMLQuantizationType
    # Where a block's scale lies, and that of its minima, which makes the mean of random codes zero
    # at so many times the scale.
    places = {"IQ2_XXS": {0: 1}, "IQ2_XS": {0: 1}, "Q2_K": {80: 1, 82: 1.5}, "Q4_K": {0: 1, 2: 7.5}}

    def filled(blocks: np.ndarray, kind: str, scale: float) -> np.ndarray:
        for at, times in places[kind].items():
            blocks[:, at : at + 2] = np.array([times * scale], np.float16).view(np.uint8)
        return blocks

    def random(kind: str, *shape: int, gain: float = 1) -> tuple[np.ndarray, Any]:
        """Weights of about the standard deviation of those of `random_packed`."""
        values, size = gguf.GGML_QUANT_SIZES[types[kind]]
        blocks = generator.integers(256, size=(np.prod(shape) // values, size), dtype=np.uint8)
        some = gguf.quants.dequantize(filled(blocks[:1000], kind, 1), types[kind])
        filled(blocks, kind, 0.5 * gain * shape[-1] ** -0.5 / some.std())
        return blocks.reshape(*shape[:-1], -1), types[kind]

    writer = gguf.GGUFWriter(path, shape.gguf)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_expert_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.chosen)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")

    def add(name: str, array: np.ndarray, kind: Any = None) -> None:
        writer.add_tensor(f"{name}.weight", array, raw_dtype=kind)

    hidden, whole, side = shape.hidden, *_attention_rows(shape)
    ones = np.ones(hidden, np.float32)
    parts = {
        "attn_q": random("Q4_K", whole, hidden),
        "attn_k": random("Q4_K", side, hidden),
        "attn_v": random("Q4_K", side, hidden),
        "attn_output": random("Q4_K", hidden, whole),
        "ffn_gate_exps": random(quantization, shape.experts, shape.intermediate, hidden),
        "ffn_up_exps": random(quantization, shape.experts, shape.intermediate, hidden),
        "ffn_down_exps": random(quantization, shape.experts, hidden, shape.intermediate),
        "attn_norm": (ones, None),
        "ffn_norm": (ones, None),
    }
    if shape.head_norms:
        parts |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (ones[: shape.head_dim], None))
    add("token_embd", *random("Q4_K", shape.vocab, hidden, gain=gain))
    add("output", *random("Q4_K", shape.vocab, hidden))
    add("output_norm", ones)
    for layer in range(layers):
        for name, part in parts.items():
            add(f"blk.{layer}.{name}", *part)
        add(f"blk.{layer}.ffn_gate_inp", router(shape, layer, skew).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="Mixtral-8x7B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=float, default=2.5)
    given = parser.parse_args()
    chosen = SHAPES[given.shape]
    packed(given.out, given.layers or chosen.layers, given.bits, shape=chosen)
