"""How often experts are used, from the calibration counts that a compressed folder carries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moepress.costs.scores import ExpertScores
from moepress.format.checkpoint import SCORES

Floats = npt.NDArray[np.float64]

# Tokens after which a use counts half (store.h). The best of 0.5 to 4096 on traces of the reference
# models, docs/log.md#experts-on-disk.
HALF_LIFE = 16.0


def frequencies(folder: Path, paths: Sequence[str], experts: Sequence[int]) -> list[Floats]:
    """[L] [E] share of the calibration tokens that chose each expert; 0 where it is unknown.

    Args:
        folder: a compressed folder. Its scores have the counts.
        paths: [L] of the experts' modules, such as `model.layers.3.mlp.experts` or
            `transformer.blocks.3.ffn.experts`.
        experts: [L] number of experts.

    Raises:
        CheckpointError: the scores are damaged.
    """
    known: dict[int, Floats] = {}
    if (folder / SCORES).is_file():
        scores = ExpertScores.load(folder / SCORES)
        shares = scores.tokens / max(scores.total_tokens, 1)
        known = dict(zip(scores.layers, shares, strict=True))
    found = []
    for path, count in zip(paths, experts, strict=True):
        number = re.search(r"\.(\d+)\.", f".{path}")  # the decoder layer's, in every family
        row = known.get(int(number[1])) if number else None
        found.append(row if row is not None and len(row) == count else np.zeros(count))
    return found


def past_uses(frequency: Floats, half_life: float = HALF_LIFE) -> Floats:
    """The number of uses at which a frequency settles, each counting half after `half_life`."""
    return frequency / (1 - 2 ** (-1 / half_life))
