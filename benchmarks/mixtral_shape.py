"""Measure time and memory of compression: Mixtral-8x7B's shape, few layers, random weights.

    python benchmarks/mixtral_shape.py make FOLDER --layers 2     # 6 GB of bfloat16
    python benchmarks/mixtral_shape.py run FOLDER OUT             # one JSON line per stage

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
    parser.add_argument("what", choices=["make", "run", "load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--sequences", type=int, default=16)
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.layers)
    elif given.what == "run":
        run(given.folder, given.out, given.recipe, given.bits, given.sequences)
    else:
        load(given.folder)
