"""Importance of tokens, eq. 6 of arXiv:2410.06270, computed beside any fast attention.

    I_j = ||t_j||_1 * mean over the queries i that see key j, and over heads, of A_ij

t_j is the input of token j to the MoE block, A the attention weights. The paper writes the mean as
sum over i of A_ij / (L - j): without padding or a window exactly L - j queries see key j. The
columns of A are summed, not its rows, which all sum to 1.

Fast attention does not return A. capture.py passes its queries and keys, after rotation and
caching, to `column_means`. That computes the attention scores of a chunk of queries once more, adds
them up over queries and heads, and frees them. Nothing of size L x L is kept.

    prefill   columns of the current call's tokens, over the queries of that call (one chunk of the
              prompt if it is processed in chunks); keys of a cache take part in the softmax
    decode    the only query is the token's own: nothing to average, so no token is protected

Long prefills use a sample of their queries. Half of it are the last queries, because few queries
see the last tokens; the other half is spread over the rest and weighted to stand for all of it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Attention scores computed at a time, by type of device: on a CPU, 2 MB that stay in the cache.
CHUNK_SCORES = {"cpu": 1 << 19, "cuda": 1 << 24}
ASKED_QUERIES = 64  # where their keys are
SAMPLED_QUERIES = 256  # of a longer prefill; what sampling costs: docs/log.md#pruning-queries


@dataclass
class AttentionRecord:
    """What a decoder layer's attention tells its experts within one forward call."""

    shape: tuple[int, int]  # sequences B, and tokens Q of each, of the call
    real: Tensor | None = None  # [B, Q] bool, false for padding; None: the layer gets no such mask
    columns: tuple[Tensor, Tensor] | None = None  # what `column_means` returns


def protected_tokens(hidden: Tensor, record: AttentionRecord | None, share: float) -> Tensor | None:
    """The most important tokens of every sequence of a prefill.

    Args:
        hidden: [B * Q, H], the input of the MoE block.
        record: of the call of the layer; None: it has none, see capture.py. Without column means
            in it the norm alone decides, with a warning.
        share: of a sequence's tokens, padding not counted. The number of tokens is rounded down, so
            that short calls (chunks of a prompt, speculated tokens) are not mostly protected.

    Returns:
        [B * Q] bool, or None where no token is protected: in decoding, with packed sequences,
        where the share is less than one token, and where the experts see other tokens than the
        layer.
    """
    if record is None or math.prod(record.shape) != len(hidden):
        return None
    sequences, tokens = record.shape
    importance = hidden.abs().sum(-1, dtype=torch.float32).view(sequences, tokens)
    real = record.real
    if record.columns is None or record.columns[0].shape != importance.shape:
        if not torch.compiler.is_compiling():
            _warn_of_norms_alone()
    else:
        mean, real = record.columns
        importance *= mean
    if real is None:
        real = torch.ones_like(importance, dtype=torch.bool)
    count = (real.sum(1, keepdim=True) * share).floor()
    order = importance.masked_fill(~real, -1).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(tokens, device=order.device).expand_as(order))
    return ((place < count) & real).flatten()


@cache
def _warn_of_norms_alone() -> None:
    """Warn once in a process."""
    logger.warning(
        "The attention weights of some layers are not available (linear attention, or another "
        "implementation than sdpa and eager): which tokens keep all experts there is decided by "
        "their norm alone. Where the model has softmax attention, load it with "
        "attn_implementation='sdpa'."
    )


@torch.no_grad()
def column_means(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    *,
    bias: Tensor | None = None,
    queries: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Column means of the softmax: how much each token of the call is attended to.

    Args:
        query: [B, heads, Q, D], rotated.
        key: [B, key heads, K, D], K >= Q: keys of the cache and of the call's own tokens. Each key
            head serves heads / key heads neighbouring query heads.
        mask: bool [B or 1, heads or 1, Q, K], true where a query may look, or the same as numbers
            to add; None: causal, and if K > Q only the first Q keys are in use.
        scaling: of the scores; None: D ** -0.5.
        bias: [B or 1, heads or 1, Q, K], added to the scores.
        queries: size of the sample of queries (`sampled_queries`); None: use all queries.

    Returns:
        Mean [B, Q] float32 of A_ij over heads and the queries i that see token j (0 where none
        does), and [B, Q] bool, false for padding.
    """
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1:3]
    own, real = own_columns(query, keys, mask)  # [Q], [B, Q]
    rows, counts = _sampled(real, queries, mask is not None)  # [1 or B, S]
    total = query.new_zeros((batch, keys), dtype=torch.float32)
    seen_by = torch.zeros_like(total)  # queries that see each key
    # float32: torch's bfloat16 products take eight times as long on CPUs without AMX.
    q = _take(query, rows).float() * (width**-0.5 if scaling is None else scaling)
    k = key.float().transpose(2, 3)
    most = CHUNK_SCORES.get(query.device.type, CHUNK_SCORES["cuda"])
    step = max(1, most // (batch * heads * keys))
    for start in range(0, rows.shape[1], step):
        chunk, count = rows[:, start : start + step], counts[:, None, start : start + step]
        # Without a mask, no query of the chunk sees a key after the chunk's last query.
        here = keys if mask is not None else min(keys, int(chunk[0, -1]) + 1)
        real_query = real.gather(1, chunk.expand(batch, -1))
        visible = _visible(mask, chunk, own, here) & real_query[:, None, :, None]  # [B, h, c, here]
        # The heads that share a key head are rows of one product: [B, groups, heads/groups * c, D].
        grouped = q[:, :, start : start + step].reshape(batch, groups, -1, width)
        scores = (grouped @ k[..., :here]).view(batch, heads, -1, here)
        if mask is not None and mask.is_floating_point():
            scores += _take(mask, chunk)
        if bias is not None:
            scores += _take(bias, chunk)[..., :here]
        weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
        weights.nan_to_num_(0.0)  # rows of queries that see nothing
        total[:, :here] += (count @ weights.sum(1))[:, 0]
        seen_by[:, :here] += (count @ visible.float().mean(1))[:, 0]
    return (total / (heads * seen_by.clamp(min=1e-9)))[:, own], real


def sampled_queries(
    length: int, queries: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The sample of a prefill's queries, and how many queries each of them stands for.

    Args:
        length: queries of the prefill.
        queries: size of the sample; None: all.

    Returns:
        Indices [S] int64, rising, and counts [S] float32 that sum to `length`.
    """
    if queries is None or length <= queries:
        return torch.arange(length, device=device), torch.ones(length, device=device)
    last = queries // 2
    before, spread = length - last, queries - last
    middles = (torch.arange(spread, device=device) + 0.5) * (before / spread)
    rows = torch.cat([middles.long(), torch.arange(before, length, device=device)])
    return rows, torch.where(rows < before, before / spread, 1.0)


def _sampled(real: Tensor, queries: int | None, masked: bool) -> tuple[Tensor, Tensor]:
    """`sampled_queries` of every sequence without its padding: indices and counts [1 or B, S]."""
    length = real.shape[1]
    if not masked or queries is None or length <= queries or bool(real.all()):
        rows, counts = sampled_queries(length, queries, real.device)
        return rows[None], counts[None]
    real_first = real.int().argsort(dim=1, descending=True, stable=True)  # [B, Q]
    index = torch.zeros((len(real), queries), dtype=torch.int64, device=real.device)
    weight = torch.zeros(index.shape, device=real.device)  # 0: fewer real tokens than queries
    for row, tokens in enumerate(real.sum(1).tolist()):
        rows, counts = sampled_queries(tokens, queries, real.device)
        index[row, : len(rows)] = real_first[row, rows]
        weight[row, : len(rows)] = counts
    return index, weight


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """The queries `rows` [1 or B, S] of [B or 1, heads, Q, x]."""
    if len(rows) == 1:
        return values[:, :, rows[0]]
    values = values.expand(len(rows), -1, -1, -1)
    return values.take_along_dim(rows[:, None, :, None], dim=2)


def means_of_weights(weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `column_means`, from attention weights [B, heads, Q, K]."""
    own, real = own_columns(weights, weights.shape[3], mask)
    rows = torch.arange(weights.shape[2], device=weights.device)[None]
    visible = _visible(mask, rows, own, weights.shape[3]) & real[:, None, :, None]
    total = weights.float().masked_fill(~visible, 0).sum((1, 2))
    seen_by = visible.sum(2).float().mean(1)
    return (total / (weights.shape[1] * seen_by.clamp(min=1)))[:, own], real


def own_columns(query: Tensor, keys: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The columns of the call's own tokens among the keys, and which of the tokens are real.

    A dynamic cache has the own tokens last. A static cache has them after the earlier tokens and
    before its free places. The mask tells: the last key that a query sees is its own. Of queries of
    padding, and of those that look ahead, it is another, at another distance from each; so the most
    frequent distance of a sequence counts, and the smallest where all differ.

    Args:
        query: [B, heads, Q, anything].
        keys: K.
        mask: as of `column_means`.

    Returns:
        [Q] int64, and [B, Q] bool, false for padding.
    """
    batch, _, length, _ = query.shape
    at = torch.arange(length, device=query.device)
    if mask is None:
        return at, torch.ones((batch, length), dtype=torch.bool, device=query.device)
    seen = _as_bool(mask).any(1)  # [B or 1, Q, K]
    if keys > length:
        places = torch.arange(keys, device=query.device)
        some = torch.arange(length - 1, -1, -max(1, length // ASKED_QUERIES), device=query.device)
        last = (seen[:, some] * places).amax(2)  # [B or 1, some of Q]
        # A 0-d tensor: reading it would stall a GPU.
        first = (last - some).mode(1).values.amax()
        at = (at + first).clamp(0, keys - 1)
    sees_itself = seen.gather(2, at.expand(len(seen), -1)[..., None])[..., 0]
    return at, sees_itself.expand(batch, -1)


def _as_bool(mask: Tensor) -> Tensor:
    """A bool mask, true where a query may look; a mask of numbers has huge negative ones else."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _visible(mask: Tensor | None, rows: Tensor, own: Tensor, keys: int) -> Tensor:
    """[B or 1, heads or 1, S, keys] bool: which query of `rows` may look at which key."""
    if mask is not None:
        return _as_bool(_take(mask, rows))
    return (torch.arange(keys, device=rows.device) <= own[rows[0], None])[None, None]
