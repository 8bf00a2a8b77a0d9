"""What it would cost to round the embedding and the head: the two ends of a model.

Embedding. Its output is a row of the table, so the error of a token is that of its row, weighed by
the sensitivity of the embedding's output there:

    cost = sum_t s_t |E_id(t) - E'_id(t)|^2

Head. Its output are the logits, and what an error e of them costs is known exactly to second order:

    KL(p || p') ~ 1/2 Var_p(e) = 1/2 (sum_v p_v e_v^2 - (sum_v p_v e_v)^2)

averaged over some of the tokens. Both are rounded to nearest, on a grid that is searched for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moepress.layout import codec_for, free_ends
from moepress.quantizers import quantize_matrix
from moepress.recipe import END_BITS, UNQUANTIZED, Recipe
from moepress.sensitivity import EMBEDDING
from moepress.walk import Walk

HEAD_TOKENS = 4096  # on which an error of the logits is weighed
TOKENS_AT_ONCE = 256  # logits of a large vocabulary are the largest thing there is


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
    ends = free_ends(walk.source, recipe)
    costs = torch.zeros(len(ends), sources, len(END_BITS), dtype=torch.float64)
    for row, (name, roles) in enumerate(ends.items()):
        weight = walk.source.tensor(name)
        widths = [bits for bits in END_BITS if bits != UNQUANTIZED]
        codecs = [codec_for(bits, weight.shape[1], recipe.group_size) for bits in widths]
        errors = [quantize_matrix("rtn", weight, c).dequantize() - weight.float() for c in codecs]
        if "embedding" in roles:
            s = sensitivity[EMBEDDING].double()
            for column, error in enumerate(errors):
                of_token = error.square().sum(1).double().cpu()[walk.ids.flatten()]
                costs[row, :, column] += torch.bincount(origin, s * of_token, minlength=sources)
        if "head" in roles:
            costs[row, :, : len(errors)] += head_costs(walk, errors, origin, sources)
    return costs


def head_costs(walk: Walk, errors: Sequence[Tensor], origin: Tensor, sources: int) -> Tensor:
    """[D, W] float64: each source's part of the mean over tokens of 1/2 Var_p(e).

    Args:
        errors: [V, H] of the head's weight, at each width.
    """
    sequences, length = walk.ids.shape
    step = max(1, sequences * length // HEAD_TOKENS)
    total = torch.zeros(sources, len(errors), dtype=torch.float64)
    seen = torch.zeros(sources, dtype=torch.float64)
    head = walk.source.model.get_output_embeddings()
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with walk.source.loaded(None):
            for number in range(0, sequences, step):
                part = slice(number, number + 1)
                logits = walk.head(part, walk.states[part].to(walk.source.device))[0]
                x = inputs.pop()[0].float()
                d = origin[number * length]
                seen[d] += length
                for start in range(0, length, TOKENS_AT_ONCE):
                    rows = slice(start, start + TOKENS_AT_ONCE)
                    p = logits[rows].float().softmax(-1)
                    for column, error in enumerate(errors):
                        e = x[rows] @ error.T
                        variance = (p * e.square()).sum(-1) - (p * e).sum(-1).square()
                        total[d, column] += variance.double().sum().cpu() / 2
    finally:
        handle.remove()
    share = torch.bincount(origin, minlength=sources).double() / len(origin)
    mean = total.sum(0) / seen.sum()  # where a source has no token in the sample
    of_source = torch.where(seen[:, None] > 0, total / seen[:, None].clamp(min=1), mean)
    return share[:, None] * of_source
