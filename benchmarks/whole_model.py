"""Compress a model of a published shape, all layers of it, with the commands that a user runs.

    python benchmarks/whole_model.py make FOLDER --shape OLMoE-1B-7B    # 14 GB of bfloat16
    python benchmarks/whole_model.py run FOLDER OUT --calib TEXT        # one JSON line per command
    python benchmarks/whole_model.py make FOLDER --shape DeepSeek-V3 --layers 2 \
        --set first_k_dense_replace=1 --set n_routed_experts=16         # a part of a model

Weights are random, so results say nothing about quality; time, memory and bytes do not depend on
them. The tokenizer is that of the model which the package carries. Shapes: `shapes/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "src/moepress/demo/model"
SPREAD = 0.02  # of weights, as models are initialized


def make(folder: Path, shape: str, layers: int | None, changes: dict[str, object]) -> None:
    """Write the folder, one shard per layer, with the names of transformers' own checkpoints."""
    from transformers import AutoConfig

    fields = json.loads((HERE / f"shapes/{shape}.json").read_text()) | changes
    fields.pop("quantization_config", None)  # what is written is bfloat16
    layers = layers or fields["num_hidden_layers"]
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**fields | {"num_hidden_layers": layers})
    kinds = fields.get("first_k_dense_replace", 0) + 1  # the layers behind these are like the last
    with tempfile.TemporaryDirectory(dir=folder.parent) as one:
        shapes = dict(shapes_of(fields | {"num_hidden_layers": min(kinds, layers)}, Path(one)))
        architectures = json.loads((Path(one) / "config.json").read_text())["architectures"]
    config.architectures = architectures
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    generator = torch.Generator().manual_seed(0)
    places = {}

    def write(file: str, names: dict[str, tuple[int, ...]]) -> None:
        tensors = {name: random(size, generator) for name, size in names.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(names, file))

    write("model-rest.safetensors", {n: size for n, size in shapes.items() if ".layers." not in n})
    for layer in range(layers):
        like = f".layers.{min(layer, kinds - 1)}."
        within = {name: size for name, size in shapes.items() if like in name}
        names = {name.replace(like, f".layers.{layer}."): size for name, size in within.items()}
        write(f"model-layer-{layer}.safetensors", names)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shapes_of(fields: dict[str, object], folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of a model as `save_pretrained` writes it into the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no dict
                yield name, tuple(tensors.get_slice(name).get_shape())


def random(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights of a matrix; ones for a vector, which scales a norm."""
    if len(size) < 2:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)


def run(folder: Path, out: Path, calib: list[str], extra: list[str]) -> None:
    """Compress with the stages apart, then look at the result and use it."""
    scores, plan = out.with_suffix(".scores.safetensors"), out.with_suffix(".plan.json")
    text = [word for one in calib for word in ("--calib", one)]
    timed("compress", folder, out, "--bits", "2.5", *text, *extra, "--dry-run")
    timed("score", folder, scores, *text, *extra)
    timed("allocate", scores, plan, "--bits", "2.5")
    timed("quantize", folder, plan, out)
    timed("inspect", out, "--verify")
    timed("report", out)
    timed("generate", out, "Once upon a time", "--tokens", "64")


def timed(*command: object) -> None:
    """Run a command of moepress; print its seconds, CPU-seconds and peak RSS."""
    started = time.monotonic()
    words = [str(word) for word in command]
    process = subprocess.Popen([sys.executable, "-m", "moepress", *words])
    _, status, used = os.wait4(process.pid, 0)
    line = {
        "command": words[0],
        "status": os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--shape", default="OLMoE-1B-7B")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--set", action="append", default=[], help="FIELD=NUMBER of config.json")
    parser.add_argument("--calib", action="append", default=[])
    given, extra = parser.parse_known_args()
    if given.what == "make":
        changes = {field: int(number) for field, number in (one.split("=") for one in given.set)}
        make(given.folder, given.shape, given.layers, changes)
    else:
        run(given.folder, given.out, given.calib, extra)
