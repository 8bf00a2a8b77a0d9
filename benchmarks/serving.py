"""Compute what it takes to serve published models at 2.5 bits: memory, and bounds of the speed.

    python benchmarks/serving.py     # Markdown, the tables of docs/scale.md

Nothing is downloaded or run; plans and assumptions are those of sizes.py. One token of one sequence
reads the experts that it chooses and everything else but the embedding, of which it reads a row:

    bytes of a token   = expert bytes * k / E + other bytes - bytes of the embedding + KV cache
    weights of a token = the same, counted in weights, without the cache
    tokens/s          <= bandwidth / bytes of a token             the bound of any kernel
    tokens/s          <= rate of our kernels / weights of a token

The rates are those of whole models that were measured (CHECKS): decoding speed times weights of a
token. The same script computes the bytes of these models, and the share of the bandwidth that they
reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from moepress.allocation.plan import BitAllocation
from moepress.allocation.tensors import ModelTensors, experts_per_token
from sizes import DEFAULT, GB, OVERHEAD, TOKENS, Shape, cache_bytes, planned

BITS = 2.5
MODELS = ("Mixtral-8x22B-v0.1", "Qwen3-235B-A22B", "DeepSeek-V3", "Kimi-K2")


class Machine(NamedTuple):
    """What a machine can do."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes per second, as published
    rate: float | None  # weights per second of our kernels; None: not measured


# Mixtral-8x7B's shape with random weights, `default` at 2.5 bits, attention and head at 4 bits:
# name, layers, tokens/s, bytes per second of a plain read (results.md#averages-cpu, 2026-11-28;
# #h200-third, 2026-11-27; 34 to 56 GB/s for the two cores, for the card as of #h200).
CHECKS = (
    ("two cores, AMD EPYC (Zen 4)", 4, 33.7, 45e9),
    ("one H200", 32, 182.0, 4460e9),
)
MIXTRAL = {
    "experts": 8 * 3 * 4096 * 14336,
    "attention": 2 * 4096 * (4096 + 1024),
    "head": 32000 * 4096,
}


class Token(NamedTuple):
    """What a token reads."""

    bytes: float
    weights: float


def mixtral_token(layers: int) -> Token:
    """A token of the measured models: 2 of 8 experts at 2.5 bits, attention and head at 4."""
    experts = layers * MIXTRAL["experts"] / 4
    others = layers * MIXTRAL["attention"] + MIXTRAL["head"]
    return Token(experts * 2.5 / 8 + others * 4 / 8, experts + others)


def token(source: Shape, plan: BitAllocation) -> Token:
    """A token of a published model, after TOKENS others."""
    one = source.one_layer_of_experts
    share = experts_per_token(source.text_config) / one.experts
    tensors = ModelTensors.of(source, DEFAULT)
    tables = [n for n, roles in source.embedding_and_head.items() if roles == ("embedding",)]
    rows = sum(tensors.nbytes(n, tensors.fixed[n]) for n in tables)
    read = plan.expert_bytes * share + plan.total_bytes - plan.expert_bytes - rows
    others = sum(source.shape(n).numel() for n in source.all_names if n not in tables)
    experts = sum(experts.weights for experts in source.experts.values())
    return Token(read + cache_bytes(source.config), experts * share + others)


def rates() -> list[float]:
    """Weights per second of our kernels, of each of CHECKS."""
    return [mixtral_token(layers).weights * speed for _, layers, speed, _ in CHECKS]


def machines() -> tuple[Machine, ...]:
    """The box has 64 cores, 32 times as fast as the two measured, and 12 channels of DDR5-4800."""
    of_two_cores, of_card = rates()
    return (
        Machine("CPU box", 768 * GB, 461e9, 32 * of_two_cores),
        Machine("H200", 141 * GB, 4800e9, of_card),
        Machine("8 x H200", 8 * 141 * GB, 8 * 4800e9, None),
    )


def check_table() -> str:
    """What the measured models read, beside a plain read."""
    lines = [
        "| machine | layers | tokens/s | GB of a token | GB/s | of a plain read | 10^9 weights/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, layers, speed, plain), rate in zip(CHECKS, rates(), strict=True):
        read = mixtral_token(layers).bytes
        cells = [name, str(layers), f"{speed:.1f}", f"{read / GB:.2f}", f"{read * speed / GB:.0f}"]
        cells += [f"{read * speed / plain:.2f}", f"{rate / 1e9:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def serving_table(names: Sequence[str]) -> str:
    """Memory, and for each machine the bound by bandwidth and that by our kernels."""
    known = machines()
    head = " | ".join(f"{m.name}: bound | our kernels" for m in known)
    lines = [
        f"| model | folder | KV cache | memory | GB a token | 10^9 weights a token | {head} |",
        "|---" * (6 + 2 * len(known)) + "|",
    ]
    for name in names:
        source, (plan,) = planned(name, [BITS])
        one, cache = token(source, plan), cache_bytes(source.config)
        memory = plan.folder_bytes + OVERHEAD + cache
        cells = [name, f"{plan.folder_bytes / GB:.1f} GB", f"{cache / GB:.1f} GB"]
        cells += [f"{memory / GB:.1f} GB", f"{one.bytes / GB:.1f}", f"{one.weights / 1e9:.1f}"]
        for machine in known:
            fits = memory <= machine.memory
            bound = machine.bandwidth / one.bytes
            cells.append(f"{bound:.0f}" if fits else "does not fit")
            ours = None if machine.rate is None else min(bound, machine.rate / one.weights)
            cells.append(f"{ours:.0f}" if fits and ours is not None else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(check_table(), serving_table(MODELS), f"KV cache: {TOKENS} tokens.", sep="\n\n")


if __name__ == "__main__":
    main()
