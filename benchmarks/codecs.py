"""What scalar and trellis codes keep of a model at the same stored bytes, on held-out text.

    python benchmarks/codecs.py                     # the carried model, on stdlib text
    python benchmarks/codecs.py MODEL --calib calib/*.txt --valid valid/*.txt

Budgets are stored bits per routed-expert weight, side data and padding included. Prints a Markdown
table, one column of perplexity per text. All rows share calibration tokens, 4-bit attention, the
allocation (default, widths 1 to 4) and the evaluator.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it
sys.path.insert(0, str(Path(__file__).parent))

import torch

from allocation import base_recipe, head, measured, options
from moepress.allocate import BitAllocation, allocate
from moepress.recipe import Recipe
from moepress.score import ExpertScores, score
from moepress.source import Source

FAMILIES = ("int", "trellis")


def plan_for(scores: ExpertScores, stored: float) -> BitAllocation:
    """The plan of at most `stored` bits per routed-expert weight."""
    matrices = (scores.gate_up_shape, scores.down_shape)
    weights = scores.tokens.size * sum(rows * cols for rows, cols in matrices)
    total = scores.fixed_bytes * 8 + stored * weights
    return allocate(scores, scores.recipe_for(Recipe(bpw=total / (scores.fixed_weights + weights))))


def main() -> None:
    given = options(__doc__, "stored", [2.0, 2.25, 2.5, 3.0]).parse_args()
    torch.set_num_threads(given.threads)
    source = Source(given.model)
    base = base_recipe(given)
    scores = {family: score(source, base.with_changes(expert_codec=family)) for family in FAMILIES}
    print(head("stored | codec | code bits | bpw", given))
    for stored in given.stored:
        for family in FAMILIES:
            plan = plan_for(scores[family], stored)
            cells = f"{plan.expert_bits_per_weight:.3f} | {family} | {plan.average_bits:.2f}"
            rest = measured(source, plan, given)
            print(f"| {cells} | {plan.bits_per_weight:.3f} | {rest}", flush=True)


if __name__ == "__main__":
    main()
