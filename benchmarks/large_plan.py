"""Seconds and memory of everything but the weights, for a plan of DeepSeek-V3's shape.

    python benchmarks/large_plan.py FOLDER             # Markdown; FOLDER is made, 0.2 GB

61 layers, 58 of them with 256 experts: 44,544 matrices of experts. The original and the compressed
folder are sparse files: true headers, names and sizes, and zeros that take no room on the disk.
The embedding and the head are cut to ROWS rows, because `inspect` reads them. Costs of experts and
linears are drawn, for five calibration texts. The memory of a step is its peak resident memory less
that before it. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mixtral_shape import peak_rss
from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.allocation.tensors import ModelTensors
from moepress.costs.drop_costs import BINS, DropCosts
from moepress.costs.scores import ExpertScores
from moepress.estimate import estimate_request
from moepress.format.checkpoint import (
    DROP_COSTS,
    PLAN,
    SCORES,
    finish_folder,
    quantization_config,
    shard_name,
)
from moepress.format.codec import PackedSpec
from moepress.inspect import inspect
from moepress.original.companions import companions
from moepress.original.source import Source
from moepress.progress import set_verbosity
from moepress.propose import proposal
from moepress.quantize import expert_specs
from moepress.recipe import Recipe
from moepress.report import report
from moepress.request import Request
from moepress.score import unmeasured
from sizes import SHAPES

SHAPE = SHAPES / "DeepSeek-V3.json"
ROWS = 4096  # of embedding and head
BLOCK = 128  # rows and columns that share a scale
TEXTS = 5
RECIPE = Recipe(calib=tuple((f"text{i}", 1.0) for i in range(TEXTS)), bits=2.5)
ITEMSIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


def write_sparse(path: Path, tensors: Tensors) -> None:
    """A safetensors file of zeros that take no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + int(np.prod(shape)) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def write_original(folder: Path) -> None:
    """The original as it is published: FP8 with scales of blocks, norms and routers wider."""
    from sizes import Shape, read_config

    folder.mkdir(parents=True)
    fields = json.loads(SHAPE.read_text()) | {"vocab_size": ROWS}
    fields["quantization_config"]["weight_block_size"] = [BLOCK, BLOCK]
    fields["architectures"] = ["DeepseekV3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(fields))
    source = Shape(folder, read_config(folder))
    linears = {f"{p}.weight" for p, m in source.model.named_modules() if type(m) is nn.Linear}
    weight_map: dict[str, str] = {}

    def add(tensors: Tensors, name: str, shape: tuple[int, ...], quantized: bool) -> None:
        tensors[name] = ("F8_E4M3" if quantized else "BF16"), shape
        if quantized:
            blocks = tuple(-(-size // BLOCK) for size in shape)
            tensors[f"{name}_scale_inv"] = "F32", blocks

    for number, prefix in enumerate((None, *source.layer_paths)):
        tensors: Tensors = {}
        for name in source.names(prefix):
            quantized = name in linears and prefix is not None
            add(tensors, name, tuple(source.shape(name)), quantized)
        if number - 1 in source.experts:
            form = source.experts[number - 1].form
            path = source.experts[number - 1].path
            sides = {
                "gate": (form.intermediate, form.hidden),
                "up": (form.intermediate, form.hidden),
            }
            for expert in range(form.experts):
                for name, shape in (sides | {"down": (form.hidden, form.intermediate)}).items():
                    add(tensors, f"{path}.{expert}.{name}_proj.weight", shape, quantized=True)
        file = f"model-{number:05d}-of-00062.safetensors"
        write_sparse(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def synthetic(folder: Path) -> ExpertScores:
    """Scores with drawn costs: unequally used experts, linears that matter more."""
    source = Source(folder / "original")
    scores = unmeasured(source, RECIPE, ModelTensors.of(source, RECIPE))
    rng = np.random.default_rng(0)
    use = rng.lognormal(0, 1.2, scores.tokens.shape)
    tokens = (65536 * np.minimum(8 * use / use.sum(1, keepdims=True), 1)).astype(np.int64)
    tokens[rng.random(tokens.shape) < 0.02] = 0
    one = tokens * rng.lognormal(0, 0.7, tokens.shape)
    per_width = np.array([0.4, 0.8, 1.2])[:, None] * 4.0 ** -np.array(scores.bits)
    cost = one[:, :, None, None] * per_width * rng.lognormal(0, 0.2, (TEXTS, *one.shape, 1, 1))
    linear = rng.lognormal(0, 1, (TEXTS, len(scores.linears), 1)) * one.mean() * 20
    linear = linear * 4.0 ** -np.array(scores.linear_bits, dtype=float)
    offered = np.isfinite(scores.linear_cost)
    energy = np.linspace(1e7, 5e7, len(tokens))
    return dataclasses.replace(
        scores, tokens=tokens, routing_weight=tokens * 0.1, total_tokens=65536,
        text_tokens=(13107, 13107, 13107, 13107, 13108), cost=cost, squared_error=cost.sum(0),
        linear_cost=np.where(offered, linear, np.inf), residual_energy=energy,
        output_energy=energy / 10, provenance={"model": "synthetic"},
    )  # fmt: skip


def scores_of(folder: Path) -> ExpertScores:
    return ExpertScores.load(folder / SCORES)


def plan_of(folder: Path) -> BitAllocation:
    return BitAllocation.load(folder / PLAN)


def write_shards(folder: Path) -> tuple[dict[str, PackedSpec], list[Path]]:
    """The compressed folder's sparse shards, and the specs of its packed tensors."""
    source, plan = Source(folder / "original"), plan_of(folder)
    packed = ModelTensors.of(source, RECIPE).specs(plan.linear_bits)
    experts = expert_specs(source, plan)
    (folder / "compressed").mkdir(exist_ok=True)
    shards = []
    for layer, prefix in ((None, None), *enumerate(source.layer_paths)):
        tensors: Tensors = {}
        for name in source.names(prefix):
            shape = tuple(source.shape(name))
            tensors[name] = "BF16", shape
            if name in packed:
                tensors[name] = "U8", (packed[name].nbytes(*shape),)
        if layer in source.experts:
            one = source.experts[layer]
            for name, shape in zip(
                one.parameters, (one.gate_up_shape, one.down_shape), strict=True
            ):
                tensors[name] = "U8", (experts[name].nbytes(*shape),)
        shards.append(folder / "compressed" / shard_name(layer))
        write_sparse(shards[-1], tensors)
    return packed | experts, shards


def write_folder(folder: Path) -> Callable[[], Any]:
    """What `quantize` writes at the end: the index and config.json."""
    specs, shards = write_shards(folder)
    source = Source(folder / "original")
    out, config = folder / "compressed", source.config_json()
    for name, document in ((SCORES, scores_of(folder)), (PLAN, plan_of(folder))):
        document.save(out / name)
    draw_drop_costs(source).save(out / DROP_COSTS)
    made = quantization_config(specs, {"plan": plan_of(folder).digest()})
    return lambda: finish_folder(out, config, companions(source.folder), made, shards)


def draw_drop_costs(source: Source) -> DropCosts:
    rng = np.random.default_rng(0)
    shape = len(source.experts), 7, BINS
    ratio = np.sort(rng.random((*shape[:2], BINS + 1)), axis=-1).astype(np.float32)
    cost = np.sort(rng.random(shape), axis=-1).astype(np.float32)
    return DropCosts(tuple(source.experts), ratio, cost, cost * 0.9, True, {"model": "synthetic"})


def allocated(**changes: Any) -> Callable[[Path], Callable[[], Any]]:
    def prepare(folder: Path) -> Callable[[], Any]:
        scores = scores_of(folder)
        recipe = RECIPE.with_changes(**({"bits": None} if "size" in changes else {}) | changes)
        return lambda: allocate(scores, recipe)

    return prepare


def proposed(folder: Path) -> Callable[[], Any]:
    scores = scores_of(folder)
    return lambda: proposal(scores, RECIPE.with_changes(bits=None), {"RAM": int(256e9)})


def forecast(folder: Path) -> Callable[[], Any]:
    request = Request.of(folder / "original", RECIPE, "cpu")
    return lambda: estimate_request(request, folder / "out")


def saved_scores(folder: Path) -> Callable[[], Any]:
    scores = synthetic(folder)
    return lambda: scores.save(folder / SCORES)


def saved_plan(folder: Path) -> Callable[[], Any]:
    plan = allocate(scores_of(folder), RECIPE)
    return lambda: plan.save(folder / PLAN)


# What is prepared is not timed; what that returns is. Later steps use the files of earlier ones.
STEPS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "open the original (index and headers)": lambda f: lambda: Source(f / "original"),
    "inspect the original": lambda f: lambda: inspect(f / "original"),
    "--dry-run's estimate": forecast,
    "write scores": saved_scores,
    "read scores": lambda f: lambda: scores_of(f),
    "inspect scores": lambda f: lambda: inspect(f / SCORES),
    "allocate, 2.5 bits": allocated(),
    "allocate, 220 GB": allocated(size=220_000_000_000),
    "allocate, over the worst text": allocated(over="worst"),
    "propose budgets": proposed,
    "write the plan": saved_plan,
    "read the plan": lambda f: lambda: plan_of(f),
    "inspect the plan": lambda f: lambda: inspect(f / PLAN),
    "write index and config": write_folder,
    "inspect the compressed folder": lambda f: lambda: inspect(f / "compressed"),
    "report": lambda f: lambda: report(f / "compressed", f / "report.html"),
}


def measured(prepare: Callable[[Path], Callable[[], Any]], folder: Path) -> tuple[float, ...]:
    """Seconds, processor seconds and bytes of a step."""
    timed = prepare(folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, began, cpu = peak_rss(), time.perf_counter(), time.process_time()
    timed()
    return time.perf_counter() - began, time.process_time() - cpu, peak_rss() - before


def files(folder: Path) -> Iterable[tuple[str, int]]:
    """The documents that were written, and their bytes."""
    for path in (
        folder / "original/model.safetensors.index.json",
        folder / SCORES,
        folder / PLAN,
        folder / "compressed/config.json",
        folder / "compressed/model.safetensors.index.json",
        folder / "report.html",
    ):
        if path.exists():
            yield str(path.relative_to(folder)), path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=list(STEPS), metavar="STEP")
    given = parser.parse_args()
    set_verbosity("quiet")
    logging.disable(logging.WARNING)  # of tensors that are all zeros
    if not given.folder.exists():
        write_original(given.folder / "original")
    print("| step | seconds | CPU-seconds | MB |\n|---|---|---|---|")
    for name in given.only:
        seconds, cpu, size = measured(STEPS[name], given.folder)
        print(f"| {name} | {seconds:.2f} | {cpu:.2f} | {size / 1e6:.0f} |", flush=True)
    print("\n| file | MB |\n|---|---|")
    for name, size in files(given.folder):
        print(f"| {name} | {size / 1e6:.1f} |")


if __name__ == "__main__":
    main()
