"""Routed experts whose outputs are a few random sums of the real ones, for costs.

A cost needs nothing of an output's error e [H] but its squared norm. With S [m, H] of random signs
over sqrt(m), the mean of ||S e||^2 over all S is ||e||^2, and the sum over many tokens is near it
(Johnson and Lindenstrauss). S W of `down` [H, I] has m / H of its operations. The errors of
`down` are drawn for the rows of S W: sums of rows of noise are noise, and the part of an error that
is no noise is linear in the weights. So drawing takes m / H of the operations too.

All experts of a layer have the same S, so their costs and those of all widths can be compared
(docs/log.md#output-sketch).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from moepress.blocks.form import is_normed
from moepress.original.experts import RoutedExpert
from moepress.sending import sent

ROWS = 1024  # m; a power of 4, so that 1 / sqrt(m) is exact


def rows_in_sketch(hidden: int) -> int:
    """Rows of S W for a `down` [hidden, I]; `hidden` if a sketch would save too little."""
    return ROWS if hidden >= 2 * ROWS else hidden


def sketch_rows(expert: RoutedExpert) -> int:
    """Rows of `down` in the sketch of an expert.

    A norm after `down` needs the whole output. Where a token chooses neurons, `down` is a table.
    """
    hidden = len(expert.weights.down)
    whole = is_normed(expert.module) or expert.routed.neuron is not None
    return hidden if whole else rows_in_sketch(hidden)


def sketched(expert: RoutedExpert, seed: int) -> RoutedExpert:
    """The expert with S W in place of `down` and S times its bias; itself if that saves nothing."""
    down, bias = expert.weights.down, expert.weights.down_bias
    rows, hidden = sketch_rows(expert), len(down)
    if rows == hidden:
        return expert
    signs = sent(_signs(rows, hidden, seed, expert.layer), down.device)
    mixing = signs.to(down.dtype) * rows**-0.5
    sums = None if bias is None else mixing @ bias
    weights = expert.weights._replace(down=mixing @ down, down_bias=sums)
    return replace(expert, weights=weights)


@lru_cache(maxsize=1)
def _signs(rows: int, hidden: int, seed: int, layer: int) -> Tensor:
    """[rows, hidden] int8, -1 or 1, which depend on the arguments alone."""
    digest = hashlib.sha256(f"{seed} layer {layer}, signs".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randint(2, (rows, hidden), dtype=torch.int8, generator=generator) * 2 - 1
