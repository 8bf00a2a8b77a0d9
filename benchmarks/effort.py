"""Compute what compressing published models takes: memory, time, and the size of the result.

    python benchmarks/effort.py                # Markdown, recipe default, 2.5 bits
    python benchmarks/effort.py --recipe fast

As `moepress compress --dry-run`, for the shapes of sizes.py: nothing is downloaded. The rates of
this machine are measured, as busy as it is. So times are given relative to Mixtral-8x7B, whose
operations are timed in the same run, and then in the CPU-hours that follow if Mixtral-8x7B takes
MIXTRAL_HOURS: what the README says for one core of an AMD EPYC (Zen 4). The plan is the one that
the estimate assumes, by widths of the experts' projections: a real run measures costs first.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moepress.allocation.plan import BitAllocation
from moepress.allocation.tensors import ModelTensors
from moepress.estimate import Estimate, assumed_plan, estimate_request
from moepress.original.folder import read_config
from moepress.recipe import Recipe
from moepress.request import Request
from moepress.score import unmeasured
from sizes import GB, MORE, PUBLISHED, RAM, SHAPES, Model, Shape, describe, smallest

BITS = 2.5
MIXTRAL = "Mixtral-8x7B-v0.1"
MIXTRAL_HOURS = {"default": 30.0, "fast": 47.0}  # README, 128 x 512 tokens
TEXT = (("text.txt", 1.0),)  # not read


class Effort(NamedTuple):
    """One row of the table."""

    model: Model
    estimate: Estimate
    plan: BitAllocation


def effort(name: str, recipe: Recipe) -> Effort:
    """The estimate for a shape."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        shutil.copy(SHAPES / f"{name}.json", folder / "config.json")
        source = Shape(folder, read_config(folder))
        source.device = torch.device("cpu")
        source.files = []
        tensors = ModelTensors.of(source, recipe)
        request = Request(source, recipe, tensors, unmeasured(source, recipe, tensors))
        estimate = estimate_request(request, Path(temporary) / "out")
        return Effort(describe(name), estimate, assumed_plan(request))


def shares(plan: BitAllocation) -> str:
    """The share of each width among the experts' projections: "1: 2 %, 2: 60 %"."""
    counts = Counter(plan.bits.flatten().tolist())
    total = sum(counts.values())
    return ", ".join(f"{bits}: {100 * counts[bits] / total:.0f} %" for bits in sorted(counts))


def table(rows: Sequence[Effort], hours: float) -> str:
    """The Markdown table."""
    (mixtral,) = (row.estimate.seconds for row in rows if row.model.name == MIXTRAL)
    lines = [
        "| model | weights | bfloat16 | widths of experts | folder | RAM to run | "
        "RAM to compress | disk | time, Mixtral-8x7B = 1 | CPU-hours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, estimate, plan in rows:
        folder = plan.folder_bytes
        ratio = estimate.seconds / mixtral
        cells = [
            model.name,
            f"{model.weights / GB:.1f} G",
            f"{2 * model.weights / GB:.0f} GB",
            shares(plan),
            f"{folder / GB:.1f} GB",
            smallest(RAM, model.memory(folder)),
            f"{estimate.memory_bytes / GB:.1f} GB",
            f"{estimate.disk_bytes / GB:.0f} GB",
            f"{ratio:.1f}",
            f"{ratio * hours:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=MIXTRAL_HOURS, default="default")
    name = parser.parse_args().recipe
    recipe = Recipe.load(name, bits=BITS, calib=TEXT)
    names = sorted({**PUBLISHED, **MORE}, key=(PUBLISHED | MORE).__getitem__)
    print(table([effort(model, recipe) for model in names], MIXTRAL_HOURS[name]))


if __name__ == "__main__":
    main()
