"""Peak memory of compression against the size of a layer: one wide MoE layer, random weights.

    python benchmarks/scale.py --experts 64 256 --kind bf16 fp8 --recipe fast --nearest

Writes a model of one decoder layer with that many experts, compresses it in a process of its own,
and prints the bytes of the layer's experts on disk and in bfloat16, the peak resident memory, and
the part of it that is not mapped files. docs/scale.md shows the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY, BLOCK = 2048, 768, 384, 128
EXPERTS_PER_FILE = 32


def write_model(folder: Path, experts: int, kind: str) -> int:
    """Write the folder; returns the bytes of the routed experts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, num_experts=experts,
        num_experts_per_tok=8, moe_intermediate_size=INTERMEDIATE, intermediate_size=HIDDEN,
        norm_topk_prob=True, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    if kind == "fp8":
        path = folder / "config.json"
        declared = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
        fields = json.loads(path.read_text()) | {"quantization_config": declared}
        path.write_text(json.dumps(fields))
    vocabulary = {byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator).mul_(cols**-0.5)

    def stored(name: str, rows: int, cols: int) -> dict[str, Tensor]:
        weight = random(rows, cols)
        if kind == "bf16":
            return {name: weight.bfloat16()}
        scale = torch.full((-(-rows // BLOCK), -(-cols // BLOCK)), cols**-0.5 / 64)
        return {name: (weight / scale[0, 0]).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    layer = "model.layers.0."
    q, kv, norm = 16 * 128, 4 * 128, torch.ones(HIDDEN).bfloat16()
    rest = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN).bfloat16(),
        "lm_head.weight": random(VOCABULARY, HIDDEN).bfloat16(),
        "model.norm.weight": norm,
        f"{layer}input_layernorm.weight": norm.clone(),
        f"{layer}post_attention_layernorm.weight": norm.clone(),
        f"{layer}self_attn.q_norm.weight": torch.ones(128).bfloat16(),
        f"{layer}self_attn.k_norm.weight": torch.ones(128).bfloat16(),
        f"{layer}mlp.gate.weight": random(experts, HIDDEN).bfloat16(),
    }
    for name, rows, cols in (
        ("q", q, HIDDEN),
        ("k", kv, HIDDEN),
        ("v", kv, HIDDEN),
        ("o", HIDDEN, q),
    ):
        rest |= stored(f"{layer}self_attn.{name}_proj.weight", rows, cols)
    index = {}
    total = 0

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    save("rest.safetensors", rest)
    for start in range(0, experts, EXPERTS_PER_FILE):
        tensors: dict[str, Tensor] = {}
        for expert in range(start, min(start + EXPERTS_PER_FILE, experts)):
            for name, rows, cols in (
                ("gate", INTERMEDIATE, HIDDEN), ("up", INTERMEDIATE, HIDDEN),
                ("down", HIDDEN, INTERMEDIATE),
            ):  # fmt: skip
                tensors |= stored(f"{layer}mlp.experts.{expert}.{name}_proj.weight", rows, cols)
        total += sum(tensor.nbytes for tensor in tensors.values())
        save(f"experts-{start:04d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def memory(field: str) -> int:
    """A field of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(folder: Path, text: Path, out: Path, recipe: str, nearest: bool) -> None:
    """Compress in this process; print peaks as JSON."""
    from moepress.compress import compress
    from moepress.original.source import Source
    from moepress.recipe import Recipe

    calib = ((str(text), 1.0),)
    wanted = Recipe.load(recipe, calib=calib, sequences=4, sequence_length=128, bits=2.5)
    if nearest:
        wanted = wanted.with_changes(measure="rtn", quantizer="rtn")
    Source(folder).expert(0, 0)  # what libraries take when they first run
    before, peak, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    compress(folder, out, wanted)
    done.set()
    watcher.join()
    found = {"before": before, "anonymous": peak, "resident": memory("VmHWM")}
    print(json.dumps({**found, "seconds": time.monotonic() - started}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--kind", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--nearest", action="store_true", help="round to nearest: takes less time")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, text, out = map(Path, args.measure)
        measure(folder, text, out, args.recipe, args.nearest)
        return
    print(
        "| experts | stored | GB on disk | GB in bfloat16 | peak, GB | not mapped, GB | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in args.kind:
        for experts in args.experts:
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
                root = Path(temporary)
                disk = write_model(root / "model", experts, kind)
                text = root / "text.txt"
                text.write_text("\n".join(f"line {i}: {i * i} and {i % 7}" for i in range(4000)))
                paths = [str(root / "model"), str(text), str(root / "out")]
                command = [sys.executable, __file__, "--recipe", args.recipe, "--measure", *paths]
                command += ["--nearest"] * args.nearest
                ran = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(ran.stdout.splitlines()[-1])
            whole = 2 * 3 * experts * HIDDEN * INTERMEDIATE
            cells = [disk, whole, found["resident"], found["anonymous"]]
            row = " | ".join(f"{cell / 1e9:.2f}" for cell in cells)
            print(f"| {experts} | {kind} | {row} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
