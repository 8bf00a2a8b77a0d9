"""Compare allocations: perplexity and KL of a model at the same average expert bits.

    python benchmarks/allocation.py                     # the carried model, on stdlib text
    python benchmarks/allocation.py MODEL --calib calib/*.txt --valid valid/*.txt

Prints a Markdown table with one column of perplexity per held-out text. All rows have scalar codes;
attention, shared experts and dense MLPs at 4 bits; embedding and head unquantized. They share the
calibration tokens and the evaluator. Scores are measured once per quantizer.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

sys.path.insert(0, str(Path(__file__).parent))

import torch

from measuring import Evaluator, calibration, opened, options
from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.costs.scores import ExpertScores
from moepress.errors import BudgetError
from moepress.format.checkpoint import folder_bytes
from moepress.original.source import Source
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.score import score

WIDTHS = (1, 2, 3, 4)


def plans(
    real: ExpertScores, nearest: ExpertScores, bits: float
) -> Iterator[tuple[str, BitAllocation]]:
    """Yield (name, plan) of every method that exists at this budget."""
    methods = {
        "uniform, gptq": (real, Recipe(cost="uniform")),
        "random, gptq": (real, Recipe(cost="random")),
        "paper as released": (nearest, Recipe.load("paper-released")),
        "paper": (nearest, Recipe.load("paper")),
        "default, widths 1-3": (real, Recipe(expert_bits=WIDTHS[:3])),
        "default, widths 1-4": (real, Recipe(expert_bits=WIDTHS)),
    }
    for name, (scores, recipe) in methods.items():
        chosen = scores.recipe_for(recipe).with_changes(bits=bits, expert_bits=recipe.expert_bits)
        try:
            yield name, allocate(scores, chosen)
        except BudgetError:
            continue  # no uniform allocation at this budget


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = Source(given.model)
    base = Recipe.load("fast", **calibration(given), expert_bits=WIDTHS)
    real = score(source, base)
    nearest = score(source, base.with_changes(measure="rtn", hessian_weight="none"))
    evaluator = Evaluator(given.model, given.valid, given.windows)
    texts = " | ".join(Path(text).stem for text in given.valid)
    head = f"| bits | method | expert bpw | model bpw | bytes | {texts} | ratio | KL | seconds |"
    print(head + "\n" + "|---" * (head.count("|") - 1) + "|")
    for bits in given.bits:
        for name, plan in plans(real, nearest, bits):
            print(row(name, plan, source, evaluator), flush=True)


def row(name: str, plan: BitAllocation, source: Source, evaluator: Evaluator) -> str:
    """Quantize a plan, evaluate the folder, and return a Markdown row."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = quantize(source, plan, Path(folder) / "out")
        size, found = folder_bytes(out), evaluator(opened(out))
    perplexities = " | ".join(f"{t.perplexity:.2f}" for t in found.texts)
    return (
        f"| {plan.average_bits:.2f} | {name} | {plan.expert_bits_per_weight:.3f} "
        f"| {plan.bits_per_weight:.3f} | {size:,} | {perplexities} | {found.ratio:.4f} "
        f"| {found.kl:.4f} | {time.monotonic() - started:.0f} |"
    )


if __name__ == "__main__":
    main()
