"""Plans of any size from synthetic scores like those of real models, made in a second."""

from __future__ import annotations

from functools import cache

import numpy as np

from moepress.allocate import allocate
from moepress.costs.scores import ExpertScores
from moepress.original.sizes import PartBytes
from moepress.page.subject import Subject
from moepress.recipe import Recipe

TOKENS = 65_536


def scores(layers: int, experts: int, seed: int = 0) -> ExpertScores:
    """Scores of experts in all but the first decoder layer, unequally used, a few not at all."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 1.2, (layers, experts))
    share = np.minimum(2 * share / share.sum(1, keepdims=True), 1)
    tokens = rng.binomial(TOKENS, share).astype(np.int64)
    tokens[rng.random(tokens.shape) < 0.02] = 0
    error = tokens[:, :, None, None] * rng.lognormal(0, 0.7, (layers, experts, 1, 1))
    parts, widths = np.array([0.4, 0.8, 1.2]), np.array([0.35, 0.1, 0.03])
    squared = error * parts[:, None] * widths
    residual = np.linspace(1e7, 5e7, layers)
    return ExpertScores(
        layers=tuple(range(1, layers + 1)),
        bits=(1, 2, 3),
        tokens=tokens,
        routing_weight=tokens * rng.uniform(0.05, 0.5, tokens.shape),
        squared_error=squared,
        cost=(squared / residual[:, None, None, None])[None],
        linears=(),
        linear_bits=(4,),
        linear_bytes=np.zeros((0, 1), dtype=np.int64),
        linear_cost=np.zeros((1, 0, 1)),
        output_energy=np.full(layers, 1e6),
        residual_energy=residual,
        total_tokens=TOKENS,
        text_tokens=(TOKENS,),
        gate_up_shape=(1536, 2048),
        down_shape=(2048, 768),
        fixed_bytes=2_000_000_000,
        other_weights=1_500_000_000,
        file_bytes=12_000_000,
        group_size=128,
        provenance={"model": "synthetic", "recipe": "abc"},
        recipe=Recipe.load("fast", bits=2.3, expert_bits=(1, 2, 3)).to_dict(),
    )


@cache
def subject(layers: int, experts: int) -> Subject:
    """The subject of a report."""
    measured = scores(layers, experts)
    plan = allocate(measured)
    parts = {
        "routed experts": PartBytes(layers * experts * 9_437_184, plan.expert_bytes),
        "attention": PartBytes(2_400_000_000, 640_000_000),
        "embedding and head": PartBytes(1_240_000_000, 1_240_000_000),
    }
    return Subject(f"<synthetic> {layers} x {experts}", plan, measured, parts)
