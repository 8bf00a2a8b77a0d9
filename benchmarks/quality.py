"""Measure quality per byte: moepress and its rivals at the same stored bytes.

    python benchmarks/quality.py                     # the carried model, on stdlib text
    python benchmarks/quality.py MODEL --calib calib/*.txt --valid valid/*.txt \
        --add rivals/MODEL/* --out MODEL.json
    python benchmarks/quality.py MODEL --calib ... --valid ... --ablate --out MODEL.json

Bits are stored bits per weight over all matrices of the decoder layers, scales, zeros, padding and
routers included. Embedding, head and norms stay 16-bit in every row and do not count. Each row also
shows our `default` at the same bytes. Methods with a byte budget run at the targets; methods of
fixed sizes are shown at their own size, and `default` runs at that size too.

All rows share calibration tokens, held-out windows and the evaluator (measuring.py): transformers,
in float32, KL(original || model) in nats per token. The original is copied to float32 first, so
that calibration runs in float32 as well. Matrices that a method leaves unquantized count as 16-bit.

Rivals are folders of dequantized weights. The scripts in benchmarks/rivals make them, and each says
how its rival is installed and set up:

    python benchmarks/rivals/make_hqq.py MODEL --out rivals/MODEL
    python benchmarks/rivals/make_autoround.py MODEL --calib calib/*.txt --out rivals/MODEL
    python benchmarks/rivals/make_llama.py MODEL --calib calib/*.txt --out rivals/MODEL

Prints a Markdown table. `--out` stores every row, with figures by text, once it is measured. A
stopped run continues from there if model, texts, amounts and the code of moepress are the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it
sys.path.insert(0, str(Path(__file__).parent))

import torch

from bench import ABOUT, UNIFORM_WIDTHS, WITHIN, Bench, Kept, Row, in_float32, made_of
from measuring import LENGTH, options
from moepress.errors import BudgetError
from moepress.recipe import NAMED, Recipe

TARGETS = (1.6, 2.0, 2.25, 2.5, 3.0)
DEFAULT = "default"

# Methods with a byte budget: every named recipe.
BUDGETED: dict[str, Recipe] = dict(NAMED)
# Our methods that exist at some widths only, all other linears at 4 bits. Their costs decide
# nothing, so the cheapest measurement will do.
PLAIN = Recipe.load("fast", cost="uniform", measure="rtn", correction=0.0, balance=False)
UNIFORM: dict[str, Recipe] = {
    "uniform GPTQ": PLAIN,
    "uniform trellis": PLAIN.with_changes(expert_codec="trellis", linear_codec="trellis"),
    "round to nearest": PLAIN.with_changes(quantizer="rtn"),
}
# The ingredients of `default`: changes of its recipe that each take one away.
FOUR_BITS = {"attention_bits": 4, "shared_expert_bits": 4, "dense_mlp_bits": 4}
ABLATION: dict[str, dict[str, Any]] = {
    "no correction of earlier errors": {"correction": 0.0},
    "scalar experts": {"expert_codec": "int"},
    "scalar linears": {"linear_codec": "int"},
    "other linears at 4 bits": FOUR_BITS,
    "no gradients, other linears at 4 bits": {"sensitivity": "none"},
    "one width per expert, not per projection": {"per_projection": False},
    "the same budget in every layer": {"scope": "layer"},
    "Hessian not weighted by routing": {"hessian_weight": "none"},
    "costs of round to nearest": {"measure": "rtn"},
    "uniform experts and linears": {"cost": "uniform"},
}
ABLATION_TARGETS = (2.0, 2.5)

HEAD = (
    "| bits | method | KL | ratio | changed top choice | `default`: KL | ratio | bits "
    "| KL over KL |\n|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row, default: Row | None) -> str:
    """Format a row beside `default` at the same bytes. KL over KL: `default` divided by the row."""
    cells = f"| {row.bits:.3f} | {row.method} | {row.kl:.4f} | {row.ratio:.4f} "
    cells += f"| {row.changed_top * 100:.1f} % "
    if default is None or row.method == DEFAULT:
        return f"{cells}| | | | |"
    beside = f"| {default.kl:.4f} | {default.ratio:.4f} | {default.bits:.3f} "
    return f"{cells}{beside}| {default.kl / row.kl:.2f} |"


def possible(bench: Bench, method: str, recipe: Recipe, bits: float) -> Row | None:
    """The row; None where the method has no plan this small."""
    try:
        return bench.budgeted(method, recipe, bits)
    except BudgetError as error:
        print(f"{method} at {bits:.3f} bits: {error}", file=sys.stderr)
        return None


def lines(bench: Bench, methods: dict[str, Recipe], bits: float) -> Iterator[str]:
    """Yield the lines of methods with a byte budget, at one budget."""
    default = possible(bench, DEFAULT, BUDGETED[DEFAULT], bits)
    for method, recipe in methods.items():
        row = possible(bench, method, recipe, bits)
        if row is None:
            yield f"| {bits:.3f} | {method} | not possible | | | | | | |"
        elif abs(row.bits / bits - 1) <= WITHIN:
            yield line(row, default)
        else:  # with coarse options a method cannot use all of its budget: whole experts, by layer
            yield line(row, possible(bench, DEFAULT, BUDGETED[DEFAULT], row.bits))


def table(bench: Bench, targets: Sequence[float], rivals: list[Path]) -> Iterator[str]:
    """Yield the lines of the comparison."""
    for bits in targets:
        yield from lines(bench, BUDGETED, bits)
    fixed = [
        bench.uniform(name, recipe, width)
        for name, recipe in UNIFORM.items()
        for width in UNIFORM_WIDTHS
    ]
    fixed += [bench.rival(folder) for folder in rivals]
    for row in sorted(fixed, key=lambda row: row.bits):
        yield line(row, possible(bench, DEFAULT, BUDGETED[DEFAULT], row.bits))


def ablation(bench: Bench, targets: Sequence[float]) -> Iterator[str]:
    """Yield the lines of the ablation: `default` without each of its ingredients."""
    whole = BUDGETED[DEFAULT]
    less = {name: whole.with_changes(**changes) for name, changes in ABLATION.items()}
    methods = {name: recipe for name, recipe in less.items() if recipe != whole}
    for bits in targets:
        yield from lines(bench, {DEFAULT: whole, **methods}, bits)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--targets", type=float, nargs="+", help="stored bits per weight")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="folders of rivals")
    parser.add_argument("--ablate", action="store_true", help="take `default` apart instead")
    parser.add_argument("--out", type=Path, help="JSON of all rows, by text")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for folder in given.add:
        if not (folder / ABOUT).is_file():
            parser.error(f"{folder} has no {ABOUT}: expected a folder made by benchmarks/rivals")
    kept = Kept(given.out, made_of(given))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(in_float32(given.model, Path(folder)), given, kept)
        found = (
            ablation(bench, given.targets or ABLATION_TARGETS)
            if given.ablate
            else table(bench, given.targets or TARGETS, given.add)
        )
        print(HEAD)
        for text in found:
            print(text, flush=True)
        print(
            f"\n{bench.layer_weights:,} weights are counted; {bench.other_weights:,} more "
            f"(embedding, head, norms) have 16 bits in every row. {given.sequences} x {LENGTH} "
            f"calibration tokens, {len(bench.evaluator.tokens.ids)} held-out windows of {LENGTH}."
        )


if __name__ == "__main__":
    main()
