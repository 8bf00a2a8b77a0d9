"""What a compression will take: time, peak memory and disk, before the work starts.

The operations of every stage are counted from the model's shapes (workload/) and multiplied by
rates that are measured on this machine in about a second, as busy as it is then. No weight is
loaded and nothing is written. Without scores there is no plan yet: its widths are estimated by
assumed costs. With a GPU, peak memory is that of both memories together.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from moepress.allocate import best_plan
from moepress.allocation.plan import BitAllocation
from moepress.byte_units import size_text
from moepress.costs.scores import ROUNDED, ExpertScores
from moepress.costs.sensitivity import SENSITIVITY, result_file
from moepress.errors import CheckpointError
from moepress.format.checkpoint import SCORES, WORK, folder_bytes, is_compressed, shard_name
from moepress.format.journal import IDENTITY_FILE, layer_file
from moepress.memory import free_host_memory
from moepress.original.between import bytes_between_layers
from moepress.original.on_disk import expert_codes
from moepress.progress import announce
from moepress.ranks import here
from moepress.recipe import Recipe
from moepress.request import Request
from moepress.text.named import SELF
from moepress.work import (
    ROUNDING,
    TEXT,
    check_output,
    check_text,
    check_unfinished,
    identity,
    own_text,
    stored_scores,
)
from moepress.workload import disk, memory, stages
from moepress.workload.operations import Work
from moepress.workload.rates import REREAD, Machine, measured, seconds
from moepress.workload.shapes import ModelShape
from moepress.workload.task import Task, Widths

# Cost of a weight of a linear outside the experts, and of the head, over that of a weight of an
# expert that as many tokens use. With these, folders have the size that measured costs give within
# 13 % on small models, where embedding and head are large (docs/log.md#estimate).
LINEARS, HEAD = 2, 4
MOSTLY = 0.5  # share of the time above which the rate of reading is told


@dataclass(frozen=True)
class Stage:
    """What one stage takes."""

    name: str  # as its progress bar calls it: sample, sensitivity, score or quantize
    seconds: float  # of what is left of it
    left: float  # share of its layers that no earlier run has finished
    memory_bytes: int  # peak resident memory of the process; 0: nothing is left
    disk_bytes: int  # peak of the output folder and of temporary files; 0: nothing is left
    work: dict[str, float]  # operations of the whole stage (workload/operations.py)


@dataclass(frozen=True)
class Estimate:
    """What a compression takes."""

    stages: tuple[Stage, ...]
    folder_bytes: int | None  # of the compressed model; None: the recipe has no budget
    tokens: int  # of calibration
    scored_tokens: int  # those of them that costs are measured on
    threads: int
    device: str
    free_memory_bytes: int
    free_disk_bytes: int
    reading_seconds: float  # of all seconds: files are read
    reading_bytes_per_s: float  # as measured; 0: no files

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Peak over all stages."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Peak over all stages."""
        return max(stage.disk_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "estimate",
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "reading": self.reading,
            **{k: v for k, v in vars(self).items() if k != "stages"},
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }

    def line(self) -> str:
        """The estimate in one line."""
        each = ", ".join(f"{stage.name} {duration(stage.seconds)}" for stage in self.stages)
        words = [f"about {duration(self.seconds)} ({each})"]
        words.append(f"peak memory {size_text(self.memory_bytes)}")
        if self.folder_bytes is not None:
            words.append(f"result {size_text(self.folder_bytes)}")
        words.append(f"disk {size_text(self.disk_bytes)} at most")
        return ", ".join(words) + (f". {self.reading}" if self.reading else "")

    @property
    def reading(self) -> str:
        """What to know where reading takes most of the time; else empty."""
        if self.reading_seconds <= MOSTLY * self.seconds:
            return ""
        return (
            f"{self.reading_seconds / self.seconds:.0%} of the time is for reading, at "
            f"{size_text(self.reading_bytes_per_s)}/s, as the model's files were read just now. A "
            "busy disk, such as one that still writes them, is slower than later: estimate again."
        )


def estimate(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = "default",
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    **changes: Any,
) -> Estimate:
    """Estimate what `compress` with the same arguments takes, and check what can be checked.

    Nothing is written. Without a budget, only the stages before it is needed are counted.

    Args:
        model: folder of the original model, or its hub id.
        out: folder that `compress` would make or continue.
        recipe: a Recipe, the name of one, or a TOML or JSON file.
        device: "cpu" or "cuda".
        trust_remote_code: run code in the model's folder, where transformers has no class for it.
        changes: fields of the recipe to set.

    Raises:
        InputError: model, recipe, text or folder cannot be used.
        BudgetError: no allocation meets the budget.
        CheckpointError: the disk has too little space.
    """
    out = Path(out)
    check_output(out)
    request = Request.of(model, recipe, device, trust_remote_code, **changes)
    ids = check_text(out / WORK, request.source, request.recipe)
    scores = check_unfinished(out, request.source, request.recipe, ids)
    found = estimate_request(request, out, scores)
    here_already = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if found.disk_bytes > found.free_disk_bytes + here_already:
        raise CheckpointError(
            f"No space left for {out}: the compressed model and the work files need about "
            f"{found.disk_bytes:,} bytes; {found.free_disk_bytes:,} are free, and an earlier run "
            f"has written {here_already:,}."
        )
    return found


def announce_estimate(request: Request, out: Path) -> None:
    """Show the estimate as the first line of progress, unless `out` is finished."""
    if is_compressed(out):
        return
    source, recipe = request.source, request.recipe
    scores = here().agreed(lambda: stored_scores(out, identity(source, recipe, None)))
    count = here().count
    shared = f"; that is of one process, {count} ranks share the work" if count > 1 else ""
    announce("estimate", lambda: estimate_request(request, out, scores).line() + shared)


def estimate_request(request: Request, out: Path, scores: ExpertScores | None = None) -> Estimate:
    """The estimate of a checked request.

    Args:
        scores: those in `out`; None: costs are assumed.
    """
    task = task_of(request)
    machine = Machine(
        request.source.device,
        request.source.dtype,
        expert_codes(request.source),
        request.source.compute_dtype,
        task.shape,
        task.length,
        request.recipe.group_size,
        tuple(request.source.files),
    )
    plan = _plan(request, scores) if request.recipe.has_budget else None
    counted = work_of(task, plan, request)
    rates = measured({name for work in counted.values() for name in work}, machine)
    left = shares_left(out, len(task.shape.layers), request.recipe)
    base = psutil.Process().memory_info().rss
    peaks, disks = _peaks(task, plan, request)
    model_bytes = task.shape.disk_bytes
    unread = model_bytes  # of the model's bytes that the system has not yet in memory
    fits = model_bytes < free_host_memory()
    rows, reading = [], 0.0
    for name, work in counted.items():
        fast = max(0.0, work["read"] - unread) if fits else 0.0
        unread = max(0.0, unread - work["read"]) if fits else unread
        saved = fast * (rates["read"] - rates[REREAD])
        times = seconds(work, rates) - saved
        share = left.get(name, 1.0)
        reading += share * (work["read"] * rates["read"] - saved)
        most = (base + memory.with_kept(peaks[name]), disks[name]) if share else (0, 0)
        rows.append(Stage(name, share * times, share, *most, dict(work)))
    return Estimate(
        stages=tuple(rows),
        folder_bytes=None if plan is None else _result_bytes(plan, out),
        tokens=task.tokens,
        scored_tokens=task.scored.tokens,
        threads=torch.get_num_threads(),
        device=str(request.source.device),
        free_memory_bytes=free_host_memory(),
        free_disk_bytes=_free(out),
        reading_seconds=reading,
        reading_bytes_per_s=1 / rates["read"] if rates["read"] else 0.0,
    )


def task_of(request: Request) -> Task:
    """The request as far as its work depends on it."""
    source, tensors = request.source, request.tensors
    return Task(
        shape=ModelShape.of(source),
        recipe=request.recipe,
        sequences=request.recipe.sequences,
        length=request.recipe.sequence_length,
        open=tensors.open,
        tables={name: tensors.shapes[name] for name in tensors.tables},  # type: ignore[misc]
        head=tuple(name for name, roles in tensors.tables.items() if "head" in roles),
        between=bytes_between_layers(source, request.recipe.sequence_length),
    )


def work_of(task: Task, plan: BitAllocation | None, request: Request) -> dict[str, Work]:
    """Operations of each stage, in order."""
    found = {}
    if SELF in dict(task.recipe.calib):
        found["sample"] = stages.sampling(task)
    if task.recipe.sensitivity != "none":
        found["sensitivity"] = stages.sensitivity(task.scored)
    found["score"] = stages.score(task.scored)
    if plan is not None:
        found["quantize"] = stages.quantize(task, widths_of(plan, request))
    return found


def _peaks(
    task: Task, plan: BitAllocation | None, request: Request
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak memory and peak disk of each stage."""
    most = {
        "sample": memory.sampling(task),
        "sensitivity": memory.sensitivity(task.scored),
        "score": memory.score(task.scored),
    }
    disks = {
        "sample": 0,
        "sensitivity": disk.sensitivity(task.scored),
        "score": disk.score(task.scored),
    }
    if plan is not None:
        folder = plan.folder_bytes
        most["quantize"] = memory.quantize(task, widths_of(plan, request), folder)
        disks["quantize"] = disk.quantize(task, folder)
    return most, {name: size + disk.temporary(task) for name, size in disks.items()}


def widths_of(plan: BitAllocation, request: Request) -> Widths:
    """The widths that a plan gives to experts and tensors."""
    specs = request.tensors.specs(plan.linear_bits)
    return Widths(
        experts=Counter(pair for row in plan.widths() for pair in row),
        tensors={name: spec.bits[0] for name, spec in specs.items()},
    )


def _plan(request: Request, scores: ExpertScores | None) -> BitAllocation:
    return assumed_plan(request) if scores is None else best_plan(scores, request.recipe)


def _result_bytes(plan: BitAllocation, out: Path) -> int:
    """Bytes of the compressed folder, which may be finished."""
    return folder_bytes(out) if is_compressed(out) else plan.folder_bytes


def assumed_plan(request: Request) -> BitAllocation:
    """A plan for costs that are assumed, because they are measured only later."""
    recipe = request.recipe.with_changes(over="mean")  # the same assumptions hold for all texts
    return best_plan(assumed_scores(request.sizes, request), recipe)


def assumed_scores(sizes: ExpertScores, request: Request) -> ExpertScores:
    """Costs by assumptions: weights are alike, tokens are alike, and a bit divides by four.

    The cost of a width is 4^-bits, times the weights, times the share of the tokens that use them:
    all for a linear and the head, k / E for an expert (k / I for neurons), 1 / V for the embedding.
    Linears and the head count more (LINEARS, HEAD).
    """
    shape, tables = ModelShape.of(request.source), request.tensors.tables
    factors = {("embedding",): 1 / shape.vocabulary, ("head",): HEAD, ("embedding", "head"): HEAD}
    bits = 4.0 ** -np.array(sizes.bits, dtype=np.float64)
    weights = np.array([rows * cols for rows, cols in (shape.gate_up, shape.down)], np.float64)
    by_rounded = shape.used * np.append(weights, weights.sum())
    assert len(by_rounded) == len(ROUNDED)
    cost = np.broadcast_to(by_rounded[:, None] * bits, sizes.cost.shape).copy()
    of_linears = np.array(
        [
            request.source.shape(name).numel() * factors.get(tables.get(name, ()), LINEARS)
            for name in sizes.linears
        ],
        dtype=np.float64,
    )
    linear_cost = of_linears[:, None] * 4.0 ** -np.array(sizes.linear_bits, dtype=np.float64)
    return dataclasses.replace(
        sizes,
        tokens=np.ones_like(sizes.tokens),
        routing_weight=np.ones_like(sizes.routing_weight),
        total_tokens=1,
        cost=cost,
        squared_error=cost[0],
        linear_cost=np.where(np.isfinite(sizes.linear_cost), linear_cost, np.inf),
        residual_energy=np.ones_like(sizes.residual_energy),
        output_energy=np.ones_like(sizes.output_energy),
    )


def shares_left(out: Path, layers: int, recipe: Recipe) -> dict[str, float]:
    """The share of the layers that each stage has still to do, by the files of an earlier run."""
    work = out / WORK / "score"
    scored = (out / SCORES).is_file()
    if is_compressed(out) if recipe.has_budget else scored:
        # Text that the model wrote in part is written again, to compare it.
        text = float(not (own_text(recipe) or (out / WORK / TEXT).is_file()))
        return dict.fromkeys(("sensitivity", "score", "quantize"), 0.0) | {"sample": text}
    files = {
        "sample": [out / WORK / TEXT],
        "sensitivity": [result_file(work / SENSITIVITY, layer) for layer in range(layers)],
        "score": [layer_file(work, layer) for layer in range(layers)],
        "quantize": [out / shard_name(layer) for layer in range(layers)],
    }
    left = {name: sum(not p.is_file() for p in paths) / len(paths) for name, paths in files.items()}
    if not (out / WORK / ROUNDING / IDENTITY_FILE).is_file():
        left["quantize"] = 1.0  # shards that are there may be of other work: they are not kept
    return left | dict.fromkeys(("sensitivity", "score") if scored else (), 0.0)


def _free(out: Path) -> int:
    """Free bytes of the disk that `out` lies on, or will lie on."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def duration(seconds: float) -> str:
    """Seconds as text of two units: "45 s", "3 min 10 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
