"""What it would cost to round the embedding and the head: the two ends of a model.

Embedding. Its output is a row of the table, so the error of a token is that of its row, weighed by
the sensitivity of the embedding's output there:

    cost = sum_t s_t |E_id(t) - E'_id(t)|^2

Head. Its output are the logits, and what an error e of them costs is known exactly to second order:

    KL(p || p') ~ 1/2 Var_p(e) = 1/2 (sum_v p_v e_v^2 - (sum_v p_v e_v)^2)

averaged over some of the tokens. Both are rounded to nearest, on a grid that is searched for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.allocation.tensors import codec_for, free_widths
from moepress.costs.sensitivity import EMBEDDING
from moepress.original.backward import outputs_as_leaves
from moepress.original.walk import Walk
from moepress.recipe import END_BITS, UNQUANTIZED, Recipe
from moepress.rounding.methods import quantize_matrix

HEAD_TOKENS = 4096  # on which an error of the logits is weighed
ROWS_AT_ONCE = 8192  # of the vocabulary


@torch.inference_mode()
def score_ends(
    walk: Walk, recipe: Recipe, sensitivity: Mapping[str, Tensor], origin: Tensor
) -> Tensor:
    """Cost [M, D, W] float64 of the ends that the recipe leaves open, at each of END_BITS.

    Args:
        walk: behind the last layer.
        sensitivity: of the first layer, with the embedding's.
        origin: [T] source of text of each token.
    """
    sources = len(recipe.calib)
    free = free_widths(walk.source, recipe)
    ends = {name: roles for name, roles in walk.source.ends.items() if name in free}
    costs = torch.zeros(len(ends), sources, len(END_BITS), dtype=torch.float64)
    for row, (name, roles) in enumerate(ends.items()):
        weight = walk.source.tensor(name)
        for column, bits in enumerate(END_BITS):
            if bits == UNQUANTIZED:
                continue
            codec = codec_for(bits, weight.shape[1], recipe.group_size)
            error = quantize_matrix("rtn", weight, codec).dequantize().sub_(weight)  # [V, H]
            if "embedding" in roles:
                s = sensitivity[EMBEDDING].double()
                costs[row, :, column] += embedding_costs(error, s, walk.ids, origin, sources)
            if "head" in roles:
                costs[row, :, column] += head_costs(walk, error, origin, sources)
    return costs


def embedding_costs(error: Tensor, s: Tensor, ids: Tensor, origin: Tensor, sources: int) -> Tensor:
    """[D] float64: sum over each source's tokens of s_t times the squared error of their rows."""
    starts = range(0, len(error), ROWS_AT_ONCE)
    rows = torch.cat([error[i : i + ROWS_AT_ONCE].square().sum(1) for i in starts])
    return torch.bincount(origin, s * rows.double().cpu()[ids.flatten()], minlength=sources)


@torch.inference_mode(False)  # the head's outputs are differentiated through what follows them
def head_costs(walk: Walk, error: Tensor, origin: Tensor, sources: int) -> Tensor:
    """[D] float64: each source's part of the mean over tokens of 1/2 Var_p(e).

    Some families scale or bound what the head gives: e is the error of the head's output times the
    derivative of the logits there.

    Args:
        error: [V, H] float32 of the head's weight.
    """
    sequences, length = walk.ids.shape
    step = max(1, sequences * length // HEAD_TOKENS)
    total, seen = (torch.zeros(sources, dtype=torch.float64) for _ in range(2))
    head = walk.source.model.get_output_embeddings()
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    try:
        with walk.source.loaded(None):
            for number in range(0, sequences, step):
                part = slice(number, number + 1)
                d = origin[number * length]
                seen[d] += length
                for positions in walk.positions():
                    leaves: list[Tensor] = []
                    with torch.enable_grad(), outputs_as_leaves(head, leaves):
                        states = walk.states[part].to(walk.source.device)
                        logits = walk.head(part, states, positions)
                    (slope,) = torch.autograd.grad(logits.sum(), leaves)
                    p = logits.detach()[0].float().softmax(-1)
                    e = (inputs.pop()[0].float() @ error.T).mul_(slope[0])
                    variance = (p * e.square()).sum(-1) - (p * e).sum(-1).square()
                    total[d] += variance.double().sum().cpu() / 2
    finally:
        handle.remove()
    share = torch.bincount(origin, minlength=sources).double() / len(origin)
    mean = total.sum() / seen.sum()  # where a source has no token in the sample
    return share * torch.where(seen > 0, total / seen.clamp(min=1), mean)
