"""The calibration sequences that costs are measured on.

Rounding needs tokens for every input of a matrix, and gains from each more. A cost is one sum over
the tokens of an expert: its noise falls with the root of their number, and what noise takes from a
plan with its square. So costs are measured on some of the sequences only where experts see many
tokens (docs/log.md#score-tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.recipe import Recipe
from moepress.rounding.options import Rounding
from moepress.text.windows import divide

# Tokens of one sequence are alike, so a few long ones would say too little.
LEAST_SEQUENCES = 32
# In the mean. Each text keeps one at least, so texts of little weight may be scored on too many: a
# quarter of all sequences, at most. Costs count by weight all the same (`Texts.shares_of`).
SEQUENCES_OF_TEXT = 4


def wanted_tokens(recipe: Recipe) -> int:
    """Scored tokens of an expert, in the mean; 0: all.

    Errors of real rounding are too small on the tokens that it has fitted, and with few tokens all
    the more. Only drawn errors make up for that (rounding/held_out.py).
    """
    return recipe.score_tokens if Rounding.of_experts(recipe, recipe.measure).draws else 0


def scored_count(sequences: int, length: int, texts: int, used: float, tokens: int) -> int:
    """How many of the sequences costs are measured on.

    Args:
        sequences, length: S, L of the calibration set.
        texts: D.
        used: share of a layer's experts that a token chooses, above 0.
        tokens: as `wanted_tokens` gives them.
    """
    if not tokens:
        return sequences
    enough = math.ceil(tokens / (used * length))
    return min(sequences, max(enough, LEAST_SEQUENCES, SEQUENCES_OF_TEXT * texts))


def scored_sequences(sequences: int, weights: Sequence[float], count: int) -> Tensor:
    """The numbers of some sequences of each text, at equal distances: [count] int64, rising.

    Args:
        sequences: S, drawn in proportion to `weights`, text by text.
        weights: [D] of the texts.
        count: D to S.
    """
    chosen, start = [], 0
    of_texts = divide(sequences, weights)
    for share, kept in zip(of_texts, divide(count, of_texts), strict=True):
        chosen += [start + share * i // kept for i in range(kept)]
        start += share
    return torch.tensor(chosen)
