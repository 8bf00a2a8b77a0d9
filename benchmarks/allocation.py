"""What each allocation keeps of a model at the same average expert bits, on held-out text.

    python benchmarks/allocation.py                     # the carried model, on stdlib text
    python benchmarks/allocation.py MODEL --calib calib/*.txt --valid valid/*.txt

Prints a Markdown table, one column of perplexity per text. All rows share calibration tokens, 4-bit
attention, and evaluator; scores are measured once per quantizer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

import torch

from moepress.allocate import BitAllocation, allocate
from moepress.demo import MODEL
from moepress.errors import BudgetError
from moepress.evaluate import evaluate
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.score import ExpertScores, score
from moepress.source import Source

WIDTHS = (1, 2, 3, 4)


def plans(
    real: ExpertScores, nearest: ExpertScores, bits: float
) -> Iterator[tuple[str, BitAllocation]]:
    """(name, plan) of every method that exists at this budget."""
    methods = {
        "uniform, gptq": (real, Recipe(cost="uniform")),
        "random, gptq": (real, Recipe(cost="random")),
        "paper as released": (nearest, Recipe.load("paper-released")),
        "paper": (nearest, Recipe.load("paper")),
        "default": (real, Recipe()),
        "default, widths 1-4": (real, Recipe(expert_bits=WIDTHS)),
    }
    for name, (scores, recipe) in methods.items():
        chosen = scores.recipe_for(recipe).with_changes(bits=bits, expert_bits=recipe.expert_bits)
        try:
            yield name, allocate(scores, chosen)
        except BudgetError:
            continue  # no uniform allocation at this budget


def options(about: str, budget: str, budgets: list[float]) -> argparse.ArgumentParser:
    """What can be set: model, texts, budgets (`--bits` or the like) and how much is looked at."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--calib", nargs="+", default=["stdlib"])
    parser.add_argument("--valid", nargs="+", default=["stdlib"])
    parser.add_argument(f"--{budget}", type=float, nargs="+", default=budgets)
    parser.add_argument("--sequences", type=int, default=120)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def base_recipe(given: argparse.Namespace) -> Recipe:
    return Recipe(
        calib=tuple((text, 1.0) for text in given.calib),
        sequences=given.sequences,
        sequence_length=256,
        expert_bits=WIDTHS,
    )


def head(columns: str, given: argparse.Namespace) -> str:
    """The head of a table whose rows end with what `measured` gives."""
    domains = " | ".join(Path(text).stem for text in given.valid)
    line = f"| {columns} | bytes | {domains} | ratio | KL | seconds |"
    return line + "\n" + "|---" * (line.count("|") - 1) + "|"


def measured(source: Source, plan: BitAllocation, given: argparse.Namespace) -> str:
    """Quantize and evaluate a plan: bytes, perplexities, ratio, KL and seconds, as cells."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = quantize(source, plan, Path(folder) / "out")
        result = evaluate(out, given.valid, against=given.model, limit=given.windows)
    perplexities = " | ".join(f"{t.perplexity:.2f}" for t in result.texts)
    return (
        f"{result.folder_bytes:,} | {perplexities} | {result.ratio:.4f} | {result.kl:.4f} "
        f"| {time.monotonic() - started:.0f} |"
    )


def main() -> None:
    given = options(__doc__, "bits", [1.5, 2.0, 2.5, 3.0]).parse_args()
    torch.set_num_threads(given.threads)
    source = Source(given.model)
    base = base_recipe(given)
    real = score(source, base)
    nearest = score(source, base.with_changes(measure="rtn", hessian_weight="none"))
    print(head("bits | method | expert bpw | model bpw", given))
    for bits in given.bits:
        for name, plan in plans(real, nearest, bits):
            cells = f"{plan.average_bits:.2f} | {name} | {plan.expert_bits_per_weight:.3f}"
            rest = measured(source, plan, given)
            print(f"| {cells} | {plan.bits_per_weight:.3f} | {rest}", flush=True)


if __name__ == "__main__":
    main()
