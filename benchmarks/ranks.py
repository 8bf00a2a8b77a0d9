"""Compute how evenly ranks share a compression, and what they do not share (docs/scale.md#ranks).

    python benchmarks/ranks.py                # DeepSeek-V3, 1 to 32 ranks

Operations are those of the estimate of `moepress compress --dry-run`, at the rates of this machine,
which are measured. The experts of a layer are chosen by a Zipf law (the n-th by n^-s) and divided
as `Ranks.owners` does. Reading, and what ranks send each other, is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from effort import BITS, TEXT
from moepress.allocation.tensors import ModelTensors
from moepress.estimate import assumed_plan, expert_codes, task_of, widths_of
from moepress.original.folder import read_config
from moepress.ranks import Ranks
from moepress.recipe import Recipe
from moepress.request import Request
from moepress.rounding.hessian import column_slices
from moepress.rounding.options import Rounding
from moepress.score import unmeasured
from moepress.workload import operations as op
from moepress.workload import stages
from moepress.workload.operations import Work
from moepress.workload.rates import Machine, measured, seconds
from moepress.workload.shapes import Layer
from moepress.workload.task import Task, Widths
from sizes import SHAPES, Shape


class Share(NamedTuple):
    """Operations of one kind, and how ranks divide them."""

    name: str
    tasks: Sequence[Work]
    loads: Sequence[float] | None  # by which `owners` divides the tasks; None: each rank does all


def zipf(experts: int, choices: int, tokens: int, s: float) -> list[int]:
    """Tokens of each expert, the most first: n^-s of the choices, at most all tokens."""
    share = np.arange(1, experts + 1) ** -s
    return [int(count) for count in np.minimum(choices * share / share.sum(), tokens).round()]


def shares(task: Task, widths: Widths, layer: Layer, counts: Sequence[int]) -> list[Share]:
    """The work in a layer, in all stages."""
    shape, recipe, tokens = task.shape, task.recipe, task.tokens
    scored, rounded = recipe.measure, recipe.quantizer
    groups = layer.sharing_inputs({linear.name for linear in layer.linears})
    linears, statistics, sizes = [], [], []
    groups = [group for group in groups if all(linear.name in task.open for linear in group)]
    for group in groups:
        cols, in_16_bits = group[0].cols, shape.products_in_16_bits
        sums = op.inputs(tokens, cols, rotates=True, corrects=False)
        sums += op.inputs(tokens, cols, rotates=True, corrects=True, in_16_bits=in_16_bits)
        every = stages._score_linears(task, group, Rounding.of_linears(recipe, scored))
        every += stages._quantize_linears(
            task, group, Rounding.of_linears(recipe, rounded), widths, corrects=True
        )
        linears.append(every - sums)
        slices = column_slices(cols)
        own = [(s.stop - s.start) * (2 * cols - s.start) for s in slices]  # H from the diagonal on
        statistics += [op.times(size / sum(own), sums) for size in own]
        sizes += [float(size) for size in own]
    experts, usual = [], max(widths.experts, key=widths.experts.__getitem__)
    for count in counts if layer.has_experts else ():
        at = replace(task, shape=replace(shape, experts=tokens, experts_per_token=count))
        walks = op.times(3 + stages.BACKWARD, stages.expert_forward(task, count))
        walks += op.times(4, op.load(shape.expert_weights, shape.expert_disk))
        experts.append(
            walks
            + stages._score_expert(at, Rounding.of_experts(recipe, scored))
            + stages._quantize_expert(at, usual, Rounding.of_experts(recipe, rounded))
        )
    runs = (12 if layer.has_experts else 7) + stages.BACKWARD
    batch = op.times(runs / task.batches, stages.layer_forward(task, layer))
    mean = sum(counts) / len(counts)
    return [
        Share("experts", experts, [count + mean for count in counts] if experts else []),
        Share("Hessians of linears", statistics, sizes),
        Share("rounding linears", linears, [float(group[0].cols) ** 2 for group in groups]),
        Share("running layers", [batch] * task.batches, [1.0] * task.batches),
    ]


def outside(task: Task, widths: Widths) -> list[Share]:
    """The work outside the layers. Sequences of the head's gradient are divided like batches."""
    head = stages.head_gradient(task, task.tokens)
    batches = [op.times(1 / task.batches, head)] * task.batches
    tables = stages._score_tables(task)
    return [
        Share("gradient of the head", batches, [1.0] * len(batches)),
        Share("costs of embedding and head", [op.times(1 / 3, tables)] * 3, [1.0] * 3),
        Share("rounding embedding and head", [stages._tables(task, widths)], None),
    ]


def slowest(share: Share, ranks: int, time: Callable[[Work], float]) -> float:
    """Seconds of the rank with most to do."""
    times = [time(work) for work in share.tasks]
    if share.loads is None:
        return sum(times)
    owners = Ranks(0, ranks).owners(share.loads)
    pairs = list(zip(owners, times, strict=True))
    return max(sum(t for owner, t in pairs if owner == rank) for rank in range(ranks))


def prepared(name: str) -> tuple[Task, Widths, Machine]:
    """The task of compressing a published shape, its plan, and this machine."""
    recipe = Recipe.load("default", bits=BITS, calib=TEXT)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        shutil.copy(SHAPES / f"{name}.json", folder / "config.json")
        source = Shape(folder, read_config(folder))
        source.device, source.files = torch.device("cpu"), []
        tensors = ModelTensors.of(source, recipe)
        request = Request(source, recipe, tensors, unmeasured(source, recipe, tensors))
        task, widths = task_of(request), widths_of(assumed_plan(request), request)
        about = source.dtype, expert_codes(source), source.compute_dtype
        machine = Machine(source.device, *about, task.shape, task.length, recipe.group_size, ())
    return task, widths, machine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DeepSeek-V3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--zipf", type=float, default=1.0, help="s")
    options = parser.parse_args()
    task, widths, machine = prepared(options.model)
    shape = task.shape
    choices = task.tokens * shape.experts_per_token
    counts = zipf(shape.experts, choices, task.tokens, options.zipf)
    every = [share for layer in shape.layers for share in shares(task, widths, layer, counts)]
    every += outside(task, widths)
    rates = measured({name for s in every for work in s.tasks for name in work}, machine)
    hours: dict[str, dict[int, float]] = {share.name: {} for share in every}
    known: dict[int, float] = {}
    for share in every:
        for ranks in options.ranks:
            times = hours[share.name]
            spent = slowest(share, ranks, lambda work: seconds(work, rates)) / 3600
            times[ranks] = times.get(ranks, 0) + spent
            known[ranks] = known.get(ranks, 0) + spent
    print(f"| hours of the slowest rank | {' | '.join(map(str, options.ranks))} |")
    print("|---" * (1 + len(options.ranks)) + "|")
    for name, times in [*hours.items(), ("all", known)]:
        print(f"| {name} | {' | '.join(f'{times[n]:.2f}' for n in options.ranks)} |")
    gains = (f"{known[options.ranks[0]] / known[n]:.1f}" for n in options.ranks)
    print(f"| times as fast | {' | '.join(gains)} |")


if __name__ == "__main__":
    main()
