"""Peak memory of compression against the size of a layer: wide MoE layers, random weights.

    python benchmarks/scale.py --experts 64 256 --kind bf16 fp8 --recipe fast --nearest
    python benchmarks/scale.py --family deepseek_v3 --layers 2 --kind fp8 --recipe fast --nearest

Writes a model of a few decoder layers with that many experts, compresses it in a process of its
own, and prints the bytes of the experts on disk and in bfloat16, the peak memory that `compress
--dry-run` tells, the peak resident memory, and the part of it that is not mapped files.
docs/scale.md shows the result.
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
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, BLOCK = 384, 128
EXPERTS_PER_FILE = 32
KINDS = ("bf16", "fp8")
TEXT = {"sequences": 4, "sequence_length": 128}  # of the calibration set
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 2048, "intermediate_size": 2048, "moe_intermediate_size": 768,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    # A seventh of DeepSeek-V3's width, an eighth of its experts' inner width; else its shape.
    "deepseek_v3": {
        "hidden_size": 1024, "intermediate_size": 2560, "moe_intermediate_size": 256,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 256,
        "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    },
}  # fmt: skip


def config_of(family: str, layers: int, experts: int) -> Any:
    from transformers import AutoConfig

    count = "num_experts" if family == "qwen3_moe" else "n_routed_experts"
    fields = FIELDS[family] | {count: experts, "num_hidden_layers": layers}
    return AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, dtype="bfloat16", **fields
    )


def write_model(folder: Path, family: str, layers: int, experts: int, kind: str) -> int:
    """Write the folder; returns the bytes of the routed experts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from moepress.original.folder import read_config
    from sizes import Shape

    config_of(family, layers, experts).save_pretrained(folder)
    source = Shape(folder, read_config(folder))
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

    inside = tuple(f"{path}." for path in source.layer_paths)
    modules = source.model.named_modules()
    linears = {f"{path}.weight" for path, module in modules if type(module) is nn.Linear}
    rest: dict[str, Tensor] = {}
    for name in source.all_names:
        shape = tuple(source.shape(name))
        if name in linears and name.startswith(inside):
            rest |= stored(name, *shape)
        elif len(shape) == 2:
            rest[name] = random(*shape).bfloat16()
        else:  # norms, and the biases of routers
            rest[name] = torch.full(shape, float("norm" in name)).bfloat16()
    index: dict[str, str] = {}
    total = 0

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    save("rest.safetensors", rest)
    for layer, one in source.experts.items():
        inner, hidden = one.intermediate, one.hidden
        sides = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for start in range(0, experts, EXPERTS_PER_FILE):
            tensors: dict[str, Tensor] = {}
            for expert in range(start, min(start + EXPERTS_PER_FILE, experts)):
                for side, shape in sides.items():
                    tensors |= stored(f"{one.path}.{expert}.{side}_proj.weight", *shape)
            total += sum(tensor.nbytes for tensor in tensors.values())
            save(f"experts-{layer:02d}-{start:04d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def wanted(recipe: str, text: Path, nearest: bool) -> Any:
    """The recipe of the compression."""
    from moepress.recipe import Recipe

    found = Recipe.load(recipe, calib=((str(text), 1.0),), bits=2.5, **TEXT)
    return found.with_changes(measure="rtn", quantizer="rtn") if nearest else found


def predict(folder: Path, text: Path, out: Path, recipe: str, nearest: bool) -> None:
    """Print the peak memory that `--dry-run` tells, as JSON."""
    from moepress.estimate import estimate

    found = estimate(folder, out, wanted(recipe, text, nearest))
    print(json.dumps({"predicted": found.memory_bytes, "disk": found.disk_bytes}))


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

    Source(folder).expert(0, 0)  # what libraries take when they first run
    before, peak, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    compress(folder, out, wanted(recipe, text, nearest))
    done.set()
    watcher.join()
    found = {"before": before, "anonymous": peak, "resident": memory("VmHWM")}
    print(json.dumps({**found, "seconds": time.monotonic() - started}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="qwen3_moe", choices=FIELDS)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--nearest", action="store_true", help="round to nearest: takes less time")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        what, *paths = args.run
        folder, text, out = map(Path, paths)
        (predict if what == "predict" else measure)(folder, text, out, args.recipe, args.nearest)
        return
    print(
        "| experts | stored | GB on disk | GB in bfloat16 | predicted peak, GB | peak, GB "
        "| not mapped, GB | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in args.kind:
        for experts in args.experts:
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
                root = Path(temporary)
                disk = write_model(root / "model", args.family, args.layers, experts, kind)
                text = root / "text.txt"
                text.write_text("\n".join(f"line {i}: {i * i} and {i % 7}" for i in range(4000)))
                found: dict[str, float] = {}
                for what in ("predict", "measure"):
                    paths = [str(root / "model"), str(text), str(root / "out")]
                    command = [sys.executable, __file__, "--recipe", args.recipe]
                    command += ["--run", what, *paths, *["--nearest"] * args.nearest]
                    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    found |= json.loads(ran.stdout.splitlines()[-1])
            fields = FIELDS[args.family]
            weights = 3 * fields["hidden_size"] * fields["moe_intermediate_size"]
            whole = 2 * args.layers * experts * weights
            cells = [disk, whole, found["predicted"], found["resident"], found["anonymous"]]
            row = " | ".join(f"{cell / 1e9:.2f}" for cell in cells)
            print(f"| {experts} | {kind} | {row} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
