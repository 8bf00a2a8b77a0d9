"""The cost of rounding the embedding and the head.

Embedding. Its output for a token is a row of its table, so the error of the output is the error of
that row. It is weighted by the sensitivity s_t of the embedding's output:

    cost = sum_t s_t |E_id(t) - E'_id(t)|^2

Head. Its outputs are the logits. To second order, an error e of the logits costs

    KL(p || p') ~ 1/2 Var_p(e) = 1/2 (sum_v p_v e_v^2 - (sum_v p_v e_v)^2)

averaged over a sample of the tokens. Both tables are rounded to nearest on searched grids.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.costs.sensitivity import EMBEDDING
from moepress.costs.texts import Texts
from moepress.format.codec import Codec, codec_for
from moepress.original.backward import outputs_as_leaves
from moepress.original.batches import position_chunks
from moepress.original.walk import Walk
from moepress.recipe import TABLE_BITS, UNQUANTIZED
from moepress.rounding.methods import quantize_matrix

HEAD_TOKENS = 4096  # about this many tokens are sampled to measure errors of the logits
ROWS_AT_ONCE = 8192  # of the vocabulary; bounds memory


@torch.inference_mode()
def score_embedding_and_head(
    walk: Walk,
    roles: Mapping[str, tuple[str, ...]],
    group_size: int,
    sensitivity: Mapping[str, Tensor],
    texts: Texts,
) -> Tensor:
    """Cost [M, D, W] float64 of each table on each text, at each of TABLE_BITS.

    Args:
        walk: its states are those after the last layer.
        roles: "embedding", "head" or both, by the parameter name of each open table.
        sensitivity: of the first layer; it has the embedding's.
    """
    costs = torch.zeros(len(roles), texts.count, len(TABLE_BITS), dtype=torch.float64)
    for row, (name, roles_of_one) in enumerate(roles.items()):
        weight = walk.source.tensor(name)
        for option, bits in enumerate(TABLE_BITS):
            if bits == UNQUANTIZED:
                continue
            own = option % walk.ranks.count == walk.ranks.rank
            if not own and "head" not in roles_of_one:
                continue
            codec = codec_for(bits, weight.shape[1], group_size)
            error = rounding_error(weight, codec)
            cost = torch.zeros(texts.count, dtype=torch.float64)
            if "embedding" in roles_of_one:
                s = sensitivity[EMBEDDING].double()
                cost += embedding_costs(error, s, walk.division.all_ids, texts)
            if "head" in roles_of_one:
                cost += head_costs(walk, error, texts)
            costs[row, :, option] = cost if own else 0
    walk.ranks.sum_up(costs)
    return costs


def rounding_error(weight: Tensor, codec: Codec) -> Tensor:
    """What rounding a table [V, H] to nearest adds to it, [V, H] float32."""
    error = torch.empty_like(weight, dtype=torch.float32)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        rounded = quantize_matrix("rtn", weight[rows], codec).dequantize()
        torch.sub(rounded, weight[rows], out=error[rows])
    return error


def embedding_costs(error: Tensor, s: Tensor, ids: Tensor, texts: Texts) -> Tensor:
    """[D] float64: sum over each text's tokens of s_t times the squared error of the token's row.

    Args:
        error: [V, H] of the table.
        s: [T] float64, sensitivity of the embedding's output.
        ids: [S, L].
    """
    starts = range(0, len(error), ROWS_AT_ONCE)
    rows = torch.cat([error[i : i + ROWS_AT_ONCE].square().sum(1) for i in starts])
    return texts.sums(s * rows.double().cpu()[ids.flatten()])


@torch.inference_mode(False)  # differentiates the logits with respect to the head's output
def head_costs(walk: Walk, error: Tensor, texts: Texts) -> Tensor:
    """[D] float64: each text's share of the mean over tokens of 1/2 Var_p(e).

    Some families scale or bound the head's output. So e is the error of the head's output times the
    derivative of the logits with respect to that output.

    Args:
        error: [V, H] float32 of the head's weight.
    """
    sequences, length = walk.division.all_ids.shape
    step = max(1, sequences * length // HEAD_TOKENS)
    variances: dict[int, list[float]] = {}  # by sequence, of each slice of its positions
    head = walk.source.language_model.get_output_embeddings()
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    try:
        with walk.source.loaded(None):
            for local, number in enumerate(walk.division.sequences):
                if number % step:
                    continue
                one = slice(local, local + 1)
                variances[number] = []
                for positions in position_chunks(length):
                    leaves: list[Tensor] = []
                    with torch.enable_grad(), outputs_as_leaves(head, leaves):
                        states = walk.states[one].to(walk.source.device)
                        logits = walk.head(one, states, positions)
                    (slope,) = torch.autograd.grad(logits.sum(), leaves)
                    p = logits.detach()[0].float().softmax(-1)
                    e = (inputs.pop()[0].float() @ error.T).mul_(slope[0])
                    variance = (p * e.square()).sum(-1) - (p * e).sum(-1).square()
                    variances[number].append(variance.double().sum().item() / 2)
    finally:
        handle.remove()
    for of_rank in walk.ranks.everyones(variances):
        variances |= of_rank
    total, seen = (torch.zeros(texts.count, dtype=torch.float64) for _ in range(2))
    for number in sorted(variances):
        d = texts.of_token[number * length]
        seen[d] += length
        for variance_of_slice in variances[number]:
            total[d] += variance_of_slice
    mean = total.sum() / seen.sum()  # used for a text without tokens in the sample
    return texts.shares() * torch.where(seen > 0, total / seen.clamp(min=1), mean)
