"""How the routed experts of a layer are divided over ranks.

Expert parallel: whole experts, balanced by their bytes, which bound decoding, and by the work of
the calibration text, which bounds prefill: experts have different widths and different numbers of
tokens, so equal numbers of experts are not equal work. Tensor parallel: a part of every expert;
where that saves too little, whole experts too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.costs.scores import ExpertScores
from moepress.format.checkpoint import SCORES
from moepress.kernels.expert_shards import cut_experts, expert_bytes, keep_experts
from moepress.kernels.modules import PackedExperts


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this one is, and how they divide experts."""

    rank: int
    count: int
    whole: bool  # expert parallel: whole experts

    @classmethod
    def of(cls, layer: Any) -> Ranks:
        """Those of a `RoutedExperts` of vLLM."""
        config = layer.moe_config.moe_parallel_config
        if config.use_ep:
            return cls(config.ep_rank, config.ep_size, True)
        return cls(config.tp_rank, config.tp_size, False)


def calibration_tokens(folder: Path) -> Mapping[int, Sequence[int]]:
    """Calibration tokens of each expert, by decoder layer; none if the folder has no scores."""
    path = folder / SCORES
    if not path.is_file():
        return {}
    scores = ExpertScores.load(path)
    return dict(zip(scores.layers, scores.tokens.tolist(), strict=True))


def divide(packed: PackedExperts, ranks: Ranks, tokens: Sequence[int] | None) -> None:
    """Keep what one rank computes of the experts of a layer.

    Args:
        tokens: calibration tokens of each expert, [E]; None: not known, all alike.
    """
    if ranks.count == 1 or (not ranks.whole and cut_experts(packed, ranks.rank, ranks.count)):
        return
    owners = balanced(expert_bytes(packed), tokens, ranks.count)
    keep_experts(packed, {e for e, owner in enumerate(owners) if owner == ranks.rank})


def balanced(sizes: Sequence[int], tokens: Sequence[int] | None, ranks: int) -> list[int]:
    """The rank of each expert, [E]: the largest first, each to the rank that has least.

    A rank has the larger of its shares of all bytes and of all work. The work of an expert is its
    tokens times its bytes.
    """
    work = [n * size for n, size in zip(tokens or [1] * len(sizes), sizes, strict=True)]
    shares = [
        (size / max(sum(sizes), 1), one / max(sum(work), 1))
        for size, one in zip(sizes, work, strict=True)
    ]
    loads = [(0.0, 0.0)] * ranks
    owners = [0] * len(sizes)
    for expert in sorted(range(len(sizes)), key=lambda e: (-sum(shares[e]), e)):
        size, one = shares[expert]
        after = [(held + size, done + one) for held, done in loads]
        owners[expert] = min(range(ranks), key=lambda r: (max(after[r]), sum(after[r]), r))
        loads[owners[expert]] = after[owners[expert]]
    return owners
