"""What scalar and trellis codes keep of a model at the same stored bytes, on held-out text.

    python benchmarks/codecs.py                     # the carried model, on stdlib text
    python benchmarks/codecs.py MODEL --calib calib/*.txt --valid valid/*.txt

Budgets are stored bits per routed-expert weight, side data and padding included. Prints a Markdown
table, one column of perplexity per text. All rows share calibration tokens, 4-bit attention, the
allocation (default, widths 1 to 4) and the evaluator.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

import torch

from moepress.allocate import BitAllocation, allocate
from moepress.demo import MODEL
from moepress.evaluate import evaluate
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.score import ExpertScores, score
from moepress.source import Source

WIDTHS = (1, 2, 3, 4)
FAMILIES = ("int", "trellis")


def plan_for(scores: ExpertScores, stored: float) -> BitAllocation:
    """The plan of at most `stored` bits per routed-expert weight."""
    matrices = (scores.gate_up_shape, scores.down_shape)
    weights = scores.tokens.size * sum(rows * cols for rows, cols in matrices)
    total = scores.fixed_bytes * 8 + stored * weights
    return allocate(scores, scores.recipe_for(Recipe(bpw=total / (scores.fixed_weights + weights))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--calib", nargs="+", default=["stdlib"])
    parser.add_argument("--valid", nargs="+", default=["stdlib"])
    parser.add_argument("--stored", type=float, nargs="+", default=[2.0, 2.25, 2.5, 3.0])
    parser.add_argument("--sequences", type=int, default=120)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = Source(given.model)
    base = Recipe(
        calib=tuple((text, 1.0) for text in given.calib),
        sequences=given.sequences,
        sequence_length=256,
        expert_bits=WIDTHS,
    )
    scores = {family: score(source, base.with_changes(expert_codec=family)) for family in FAMILIES}
    domains = " | ".join(Path(text).stem for text in given.valid)
    print(f"| stored | codec | code bits | bpw | bytes | {domains} | ratio | KL | seconds |")
    print("|---" * (8 + len(given.valid)) + "|")
    for stored in given.stored:
        for family in FAMILIES:
            started = time.monotonic()
            plan = plan_for(scores[family], stored)
            with tempfile.TemporaryDirectory() as folder:
                out = quantize(source, plan, Path(folder) / "out")
                result = evaluate(out, given.valid, against=given.model, limit=given.windows)
            perplexities = " | ".join(f"{t.perplexity:.2f}" for t in result.texts)
            print(
                f"| {plan.expert_bits_per_weight:.3f} | {family} | {plan.average_bits:.2f} "
                f"| {plan.bits_per_weight:.3f} | {result.folder_bytes:,} | {perplexities} "
                f"| {result.ratio:.4f} | {result.kl:.4f} | {time.monotonic() - started:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
