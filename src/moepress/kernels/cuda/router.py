"""The op `moepress::route`: logits and the choice of experts for few tokens, in one launch.

route.cu says how. What its kernels do not take goes to the reference, kernels/router.py.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from moepress.kernels import router
from moepress.kernels.cuda.launch import DTYPES, Argument, aligned, is_aligned, launcher_for
from moepress.kernels.router import SCORES, Formula

MOST_TOKENS = 128
MOST_EXPERTS = 1024
MOST_CHOSEN = 32
MOST_GROUPS = 32
SMALL = 1 << 16  # numbers of a router that is read by few blocks
COUNTERS = 1 << 14  # as kCounters in route.cu

# A launch counts its blocks in a counter of its own: launches on several streams, graphs among
# them, may run at the same time. Only two that are so many launches apart share a counter.
_launches = count()


def takes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    formula: Formula,
) -> bool:
    """Whether the kernels take such arguments, which fit each other."""
    given = [x for x in (hidden, weight, bias, correction) if x is not None]
    dtypes = (
        formula.product_dtype,
        formula.logits_dtype,
        formula.score_dtype,
        formula.weights_dtype,
    )
    return (
        all(x.dtype in DTYPES for x in given)
        and all(dtype in DTYPES for dtype in dtypes)
        and len(hidden) <= MOST_TOKENS
        and len(weight) <= MOST_EXPERTS
        and hidden.shape[1] > 0
        and hidden.shape[1] % 8 == 0
        and top_k <= MOST_CHOSEN
        and formula.groups <= MOST_GROUPS
        # Kernels read these before the kernel before them has ended: no copies of them.
        and is_aligned(weight)
        and (bias is None or bias.is_contiguous())
    )


def route(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `moepress::route`. Sums are in float32, in a fixed order."""
    if not takes(hidden, weight, bias, correction, top_k, formula):
        return router.route(hidden, weight, bias, correction, top_k, formula)
    (tokens, cols), experts = hidden.shape, len(weight)
    logits = hidden.new_empty(tokens, experts, dtype=formula.logits_dtype)
    weights = hidden.new_empty(tokens, top_k, dtype=formula.weights_dtype)
    index = hidden.new_empty(tokens, top_k, dtype=torch.int64)
    if not tokens:
        return logits, weights, index
    launcher = launcher_for(hidden.device)
    narrow = torch.float32 not in (hidden.dtype, weight.dtype)
    name, grid, threads = kernel_of(tokens, experts, cols, narrow, launcher.multiprocessors)
    launcher.launch(
        f"moepress_route_{name}",
        grid,
        threads,
        4 * experts * (1 + 2 * min(tokens, threads // 32)),
        (
            *_read(aligned(hidden)),
            *_read(weight),
            *_read(bias),
            *_read(None if correction is None else correction.contiguous()),
            tokens,
            experts,
            cols,
            top_k,
            SCORES.index(formula.score),
            formula.groups,
            formula.kept_groups,
            formula.group_best,
            int(formula.normalise),
            float(formula.epsilon),
            float(formula.scale),
            DTYPES[formula.product_dtype],
            DTYPES[formula.score_dtype],
            DTYPES[formula.choice_dtype(correction)],
            logits,
            DTYPES[logits.dtype],
            weights,
            DTYPES[weights.dtype],
            index,
            next(_launches) % COUNTERS,
        ),
    )
    return logits, weights, index


def kernel_of(
    tokens: int, experts: int, cols: int, narrow: bool, multiprocessors: int
) -> tuple[str, tuple[int, int, int], int]:
    """The kernel that takes a call: its name, grid and threads of a block.

    Args:
        narrow: whether hidden states and weight have 16 bits.
    """
    if tokens == 1:
        if narrow and experts * cols <= SMALL:
            return "small", (-(-experts // 8), 1, 1), 1024
        return "one", (experts, 1, 1), 256
    some, tiles = -(-tokens // 4), -(-experts // 4)
    if 4 * tiles * some < multiprocessors:
        return "few", (experts, some, 1), 256
    return "tile", (tiles, some, 1), 256


def _read(x: Tensor | None) -> tuple[Argument, int]:
    return (None, 0) if x is None else (x, DTYPES[x.dtype])
