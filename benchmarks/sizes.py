"""Compute how large the default recipe makes published models, and which memory holds them.

    python benchmarks/sizes.py             # Markdown, RAM
    python benchmarks/sizes.py --cards     # the same for memories of GPU cards
    python benchmarks/sizes.py --more      # models that docs/sizes.md does not list

Nothing is downloaded. `shapes/NAME.json` holds the fields of a model's config.json that decide its
shape; transformers builds the model from it on the meta device, and the package counts bytes as
`moepress compress` does before it reads a weight. Total weights are checked against the published
number.

A real run chooses the widths outside the experts by measured costs. Here they are assumed:
attention, shared experts and dense MLPs 4 bits, embedding and head 8 bits. On the reference models
the allocator chose 3 and 4 bits for most of these linears at 2.0 and 2.5 bits (docs/log.md,
2026-11-25). The tokenizer (2 to 20 MB) is not counted.

Memory to run is the sum of the folder, OVERHEAD, and the KV cache of TOKENS tokens in bfloat16 as
transformers stores it (DeepSeek-V3: the latents; gpt-oss: sliding windows in every second layer).
OVERHEAD is peak RSS less the folder's size, measured while a model of 4 layers of Mixtral-8x7B's
shape generated text (benchmarks/results.md, 2026-11-23). A memory fits if the sum is at most SHARE
of it, the share that `moepress compress` without a budget uses. GB are 1000^3 bytes.

Where the shapes come from (read 2026-11-26). Where a model's own page was not at hand, the page of
a fine-tune of the same shape was read:
    Mixtral-8x7B-v0.1   huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1, config.json
    Mixtral-8x22B-v0.1  huggingface.co/mistral-community/Mixtral-8x22B-v0.1, config.json
    Qwen3-30B-A3B       huggingface.co/RTP-LLM/Qwen3-Coder-30B-A3B-Instruct-RTPurbo, config.json;
                        gitcode.com/Ascend/MindSpeed-RL, configs/model/qwen3_30b_a3b.yaml
    Qwen3-235B-A22B     gitcode.com/Ascend/MindSpeed-RL, configs/model/qwen3_235b_a22b.yaml
    GLM-4.5-Air         huggingface.co/PrimeIntellect/INTELLECT-3-Base, config.json
    gpt-oss-120b        transformers 5.24, GptOssConfig; docs.nvidia.com, Megatron Bridge, GPT OSS
    DeepSeek-V3         transformers 5.24, DeepseekV3Config
    DeepSeek-V3.2       transformers 5.24, DeepseekV32Config
    GLM-4.6             github.com/zyzshishui/slime, scripts/models/glm4.5-355B-A32B.sh
    GLM-5               transformers 5.24, GlmMoeDsaConfig
    Kimi-K2             github.com/ParagEkbote/hf-model-inspector, report of Kimi-K2-Instruct-0905
    Llama-4-Scout       transformers 5.24, Llama4Config, with the vision tower of the model's card
    MiniMax-M2          transformers 5.24, MiniMaxM2Config
    OLMoE-1B-7B         arXiv:2409.02060, table of its architecture; transformers 5.24, OlmoeConfig
    Nemotron-3-Nano     config.json in a test of nemotron3_jax, by the JAX authors
Published numbers of weights are those of the models' cards. For GLM-4.5-Air and DeepSeek-V3 they do
not count the layer that predicts a second token, and neither does this script.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.allocation.tensors import ModelTensors
from moepress.costs.scores import ROUNDED, ExpertScores
from moepress.original.architectures import decoder_layers, find_experts
from moepress.original.composite import copied
from moepress.original.folder import read_config
from moepress.original.skeleton import skeleton
from moepress.original.source import Source
from moepress.original.ties import Ties
from moepress.propose import SHARE
from moepress.recipe import Recipe
from moepress.score import unmeasured

SHAPES = Path(__file__).parent / "shapes"
PUBLISHED = {  # billions of weights
    "Qwen3-30B-A3B": 30.5,
    "Mixtral-8x7B-v0.1": 46.7,
    "GLM-4.5-Air": 106.0,
    "gpt-oss-120b": 117.0,
    "Mixtral-8x22B-v0.1": 141.0,
    "Qwen3-235B-A22B": 235.0,
    "DeepSeek-V3": 671.0,
}
MORE = {  # not in the table of docs/sizes.md
    "OLMoE-1B-7B": 6.9,
    "Nemotron-3-Nano-30B-A3B": 31.6,
    "Llama-4-Scout": 109.0,
    "MiniMax-M2": 230.0,
    "GLM-4.6": 355.0,
    "DeepSeek-V3.2": 671.0,
    "GLM-5": 744.0,
    "Kimi-K2": 1026.0,
}
TOLERANCE = 0.01  # of a published number, which is rounded

BUDGETS = (2.0, 2.5, 3.0)  # average code bits of the routed experts
LINEARS = {"attention_bits": 4, "shared_expert_bits": 4, "dense_mlp_bits": 4}
EMBEDDING_AND_HEAD = {"embedding_bits": 8, "head_bits": 8}
DEFAULT = Recipe(**LINEARS, **EMBEDDING_AND_HEAD)

GB = 1e9
OVERHEAD = 0.15 * GB
TOKENS = 4096
NO_CACHE = ("linear_attention", "moe", "mlp")  # layers whose cache does not grow with the tokens
RAM = (16, 24, 32, 64, 96, 128, 192, 256, 512)  # GB
CARDS = (24, 48, 80)


class Shape(Source):
    """A Source with a configuration and no weights: enough to count bytes."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.name, self.folder = folder.name, folder
        self.config, self.dtype, self.compute_dtype = config, config.dtype, config.dtype
        self.model = skeleton(config, config.dtype)
        tied = frozenset(getattr(self.model, "all_tied_weights_keys", None) or ())
        self._ties = Ties(tied, stored_as={}, untied=False)
        self.layers = decoder_layers(self.model)
        self.experts = find_experts(self.model)

    @cached_property
    def copied(self) -> dict[str, torch.dtype]:
        """All that is copied, in the dtype of the config: there is no file that has another."""
        return {name: self.dtype for name in copied(self.model) if name in self._needed}


class Model(NamedTuple):
    """One model of the table."""

    name: str
    weights: int
    cache: int  # bytes of the KV cache of TOKENS tokens
    folders: tuple[int, ...]  # bytes, for each of BUDGETS

    def memory(self, folder: int) -> float:
        """Bytes of memory that a folder of this model needs to run."""
        return folder + OVERHEAD + self.cache


def planned(name: str, budgets: Sequence[float]) -> tuple[Shape, list[BitAllocation]]:
    """Build a model from its shape, and make its plans for some numbers of bits.

    Raises:
        ValueError: the number of weights is not the published one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        shutil.copy(SHAPES / f"{name}.json", folder / "config.json")
        source = Shape(folder, read_config(folder))
        scores = assumed_costs(unmeasured(source, DEFAULT, ModelTensors.of(source, DEFAULT)))
        plans = [allocate(scores, DEFAULT, bits=bits) for bits in budgets]
    weights = sum(p.numel() for p in source.model.parameters())
    published = (PUBLISHED | MORE)[name]
    if abs(weights / published / 1e9 - 1) > TOLERANCE:
        raise ValueError(f"{name} has {weights:,} weights, published are {published}e9.")
    return source, plans


def describe(name: str) -> Model:
    """Build a model from its shape, and count its weights and bytes. Errors: as of `planned`."""
    source, plans = planned(name, BUDGETS)
    check_plans(plans)
    weights = sum(p.numel() for p in source.model.parameters())
    return Model(name, weights, cache_bytes(source.config), tuple(p.folder_bytes for p in plans))


def assumed_costs(scores: ExpertScores) -> ExpertScores:
    """Scores in which all experts are alike, and an error falls fourfold with each bit."""
    bits = 4.0 ** -np.array(scores.bits)
    weights = np.array([2.0, 1.0, 3.0])  # gate and up, down, both: by their weights
    assert len(weights) == len(ROUNDED)
    cost = np.broadcast_to(weights[:, None] * bits, scores.cost.shape).copy()
    return dataclasses.replace(
        scores,
        tokens=np.ones_like(scores.tokens),
        total_tokens=1,
        cost=cost,
        squared_error=cost[0],
        residual_energy=np.ones_like(scores.residual_energy),
    )


def check_plans(plans: list[BitAllocation]) -> None:
    """Raise ValueError where a plan misses its budget by more than a hundredth of a bit."""
    for bits, plan in zip(BUDGETS, plans, strict=True):
        if not 0 <= bits - plan.average_bits < 0.01:
            raise ValueError(f"A plan has {plan.average_bits} bits, expected {bits}.")


def cache_bytes(config: Any) -> int:
    """Bytes of the KV cache of TOKENS tokens, in bfloat16."""
    config = config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        width = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        heads, hidden = config.num_attention_heads, config.hidden_size
        head = getattr(config, "head_dim", None) or hidden // heads
        width = 2 * config.num_key_value_heads * head
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    kept = sum(
        min(TOKENS, config.sliding_window) if kind == "sliding_attention" else TOKENS
        for kind in kinds
        if kind not in NO_CACHE
    )
    return 2 * width * kept


def smallest(sizes: tuple[int, ...], needed: float) -> str:
    """The smallest memory that `needed` bytes fit in."""
    return next((f"{size} GB" for size in sizes if needed <= SHARE * size * GB), "none of these")


def table(models: Sequence[Model], sizes: tuple[int, ...], memory: str) -> str:
    """The Markdown table."""
    head = " | ".join(f"{bits} bits | {memory}" for bits in BUDGETS)
    lines = [f"| model | bfloat16 | {head} | supported |", "|---" * (3 + 2 * len(BUDGETS)) + "|"]
    for model in models:
        cells = [model.name, f"{2 * model.weights / GB:.0f} GB"]
        for folder in model.folders:
            cells += [f"{folder / GB:.1f} GB", smallest(sizes, model.memory(folder))]
        lines.append(f"| {' | '.join([*cells, 'yes'])} |")
    return "\n".join(lines)


def caption(models: Sequence[Model], sizes: tuple[int, ...], memory: str, option: str) -> str:
    """The text below the table: how it was computed."""
    caches = [model.cache / GB for model in models]
    return (
        f"Computed, not measured: `python benchmarks/sizes.py{option}`. By average code bits of "
        "the routed experts: size of the folder, and "
        f"the smallest {memory} of {', '.join(map(str, sizes))} GB that holds it: the folder, "
        f"{OVERHEAD / GB} GB and the KV cache of {TOKENS} tokens ({min(caches):.1f} to "
        f"{max(caches):.1f} GB) take at most {SHARE * 100:.0f} % of it. Assumed: attention, shared "
        "experts and dense MLPs at 4 bits, embedding and head at 8; a real run chooses these "
        "widths by measured costs."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", action="store_true", help="memories of GPU cards, not RAM")
    parser.add_argument(
        "--more", action="store_true", help="other models than those of docs/sizes.md"
    )
    arguments = parser.parse_args()
    cards = arguments.cards
    models = [describe(name) for name in (MORE if arguments.more else PUBLISHED)]
    sizes, memory, option = (CARDS, "card", " --cards") if cards else (RAM, "RAM", "")
    print(table(models, sizes, memory), caption(models, sizes, memory, option), sep="\n\n")


if __name__ == "__main__":
    main()
