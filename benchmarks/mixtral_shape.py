"""Measure time and memory of compression: Mixtral-8x7B's shape, few layers, random weights.

    python benchmarks/mixtral_shape.py make FOLDER --layers 2     # 6 GB of bfloat16
    python benchmarks/mixtral_shape.py run FOLDER OUT             # one JSON line per stage
    python benchmarks/mixtral_shape.py packed OUT --layers 32     # random codes, nothing compressed

Weights and tokens are random, so results say nothing about quality. Peak RSS is the high-water mark
of the process after each stage, pages of mapped files included. Loading is measured in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, EXPERTS, HEADS, KV_HEADS, VOCAB = 4096, 14336, 8, 32, 8, 32000


def make(folder: Path, layers: int, device: torch.device | str = "cpu") -> None:
    """Write the folder, one shard per layer, in the layout of the published checkpoints.

    Args:
        device: draws the random weights.
    """
    from transformers import MixtralConfig

    folder.mkdir(parents=True)
    config = MixtralConfig(
        num_hidden_layers=layers,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        dtype="bfloat16",
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(0, 0.02, generator=generator).cpu()

    weight_map = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    rest = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": ones,
        "lm_head.weight": random(VOCAB, HIDDEN),
    }
    write("model-rest.safetensors", rest)
    side = HIDDEN // HEADS * KV_HEADS
    for layer in range(layers):
        at = f"model.layers.{layer}"
        moe = f"{at}.block_sparse_moe"
        tensors = {
            f"{at}.input_layernorm.weight": ones.clone(),
            f"{at}.post_attention_layernorm.weight": ones.clone(),
            f"{at}.self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": random(side, HIDDEN),
            f"{at}.self_attn.v_proj.weight": random(side, HIDDEN),
            f"{at}.self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            f"{moe}.gate.weight": random(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            tensors[f"{moe}.experts.{expert}.w1.weight"] = random(INTERMEDIATE, HIDDEN)
            tensors[f"{moe}.experts.{expert}.w2.weight"] = random(HIDDEN, INTERMEDIATE)
            tensors[f"{moe}.experts.{expert}.w3.weight"] = random(INTERMEDIATE, HIDDEN)
        write(f"model-layer-{layer}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def router(layer: int, skew: float) -> torch.Tensor:
    """[E, H] bfloat16: rows of norms from (1 + skew) to (1 - skew) times sqrt(H), in random order.

    An expert of a larger norm is chosen more often.
    """
    generator = torch.Generator().manual_seed(layer if skew else 0)
    rows = torch.empty(EXPERTS, HIDDEN).normal_(generator=generator)
    norms = torch.linspace(1 + skew, 1 - skew, EXPERTS)
    return (rows * norms[torch.randperm(EXPERTS, generator=generator), None]).bfloat16()


def packed(out: Path, layers: int, bits: float, family: str = "int", skew: float = 0) -> None:
    """Write a compressed folder of random codes, `bits` on average, one shard per layer.

    Of the 8 experts of a layer, some have the next width below `bits`, the others the next above.
    Attention, head and embedding have 4 bits. All layers hold the same bytes, each in its own file.

    Args:
        family: of the codes of experts and attention: "int" as in `fast`, "trellis" as in
            `default`.
        skew: of the routers, see `router`.
    """
    from transformers import MixtralConfig

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
    above = round((bits - below) * EXPERTS)
    experts = PackedSpec((below,) * (EXPERTS - above) + (below + 1,) * above, 128, family)
    attention, four = PackedSpec((4,), 128, family), PackedSpec((4,), 128)
    side = HIDDEN // HEADS * KV_HEADS
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)

    parts = {  # of one layer
        "self_attn.q_proj.weight": (attention, HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (attention, side, HIDDEN),
        "self_attn.v_proj.weight": (attention, side, HIDDEN),
        "self_attn.o_proj.weight": (attention, HIDDEN, HIDDEN),
        "mlp.experts.gate_up_proj": (experts, 2 * INTERMEDIATE, HIDDEN),
        "mlp.experts.down_proj": (experts, HIDDEN, INTERMEDIATE),
    }
    tensors = {name: random_packed(*part, generator) for name, part in parts.items()}
    plain = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), ones)
    outside = "model.embed_tokens.weight", "lm_head.weight"
    specs = dict.fromkeys(outside, four)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        plain["mlp.gate.weight"] = router(layer, skew)
        named = {at + name: tensor for name, tensor in (tensors | plain).items()}
        save_tensors(out / shard_name(layer), {k: v.clone() for k, v in named.items()})
        specs |= {at + name: spec for name, (spec, *_) in parts.items()}
    tables = {name: random_packed(four, VOCAB, HIDDEN, generator) for name in outside}
    save_tensors(out / shard_name(None), tables | {"model.norm.weight": ones})
    config = MixtralConfig(num_hidden_layers=layers, vocab_size=VOCAB, dtype="bfloat16")
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(out)
    shards = [*map(shard_name, range(layers)), shard_name(None)]
    quantization = quantization_config(specs, {"made_by": "benchmarks/mixtral_shape.py packed"})
    fields = load_json(out / "config.json")
    finish_folder(out, fields, {}, quantization, [out / name for name in shards])


def random_packed(spec: Any, rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Bytes of a packed tensor: random codes and zeros, a scale that keeps products near 1."""
    matrices = []
    for codec in spec.codecs:
        if codec.family == "trellis":
            slabs = -(-rows // 64)
            codes = torch.randint(
                256, (slabs * codec.slab_bytes(cols),), generator=generator, dtype=torch.uint8
            )
            scales = torch.full((64 * slabs,), cols**-0.5 / 100, dtype=torch.bfloat16)
            matrices.append(torch.cat([codes, scales.view(torch.uint8)]))
            continue
        size, block = codec.nbytes(rows, cols), codec.block_bytes(cols)
        matrix = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        blocks = matrix[: -(-rows // 16) * block].view(-1, block)
        first = 2 * cols * codec.bits
        scale = torch.tensor([cols**-0.5 / codec.levels], dtype=torch.bfloat16)
        scales = scale.view(torch.uint8).repeat(16 * codec.groups(cols))
        blocks[:, first : first + len(scales)] = scales
        matrices.append(matrix)
    return torch.cat(matrices)


def run(folder: Path, out: Path, recipe_name: str, bits: float, sequences: int) -> None:
    """Score, allocate and quantize here; load in a fresh process."""
    from moepress.allocate import allocate
    from moepress.format.checkpoint import folder_bytes
    from moepress.quantize import quantize
    from moepress.recipe import Recipe
    from moepress.score import score

    recipe = Recipe.load(recipe_name, bits=bits)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (sequences, 512), generator=generator)
    work = out.with_name(out.name + ".work")
    scores = staged("score", lambda: score(folder, recipe, work=work, ids=ids))
    plan = staged("allocate", lambda: allocate(scores, recipe))
    staged("quantize", lambda: quantize(folder, plan, out, ids=ids))
    shutil.rmtree(work)
    report(stage="folder", gigabytes=folder_bytes(out) / 1e9, predicted=plan.folder_bytes / 1e9)
    subprocess.run([sys.executable, __file__, "load", str(out)], check=True)


def load(out: Path) -> None:
    """Open the folder packed, and generate."""
    from transformers import AutoModelForCausalLM

    import moepress  # noqa: F401  # registers the loader

    model = staged("load", lambda: AutoModelForCausalLM.from_pretrained(out, dtype="auto"))
    ids = torch.arange(16)[None]
    staged("generate 4 tokens", lambda: model.generate(ids, max_new_tokens=4, do_sample=False))


def staged(stage: str, work: Callable[[], Any]) -> Any:
    started, cpu = time.monotonic(), time.process_time()
    result = work()
    report(
        stage=stage,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu,
        peak_rss_gb=peak_rss() / 1e9,
    )
    return result


def peak_rss() -> int:
    """Peak RSS of this process in bytes. (getrusage would start from the parent's figure.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def report(**values: Any) -> None:
    rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "packed", "run", "load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--sequences", type=int, default=16)
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.layers)
    elif given.what == "packed":
        packed(given.folder, given.layers, given.bits)
    elif given.what == "run":
        run(given.folder, given.out, given.recipe, given.bits, given.sequences)
    else:
        load(given.folder)
