"""Which tokens matter most to the others: eq. 6 of arXiv:2410.06270, beside any fast attention.

    I_j = ||t_j||_1 * mean over the queries i that see key j, and over heads, of A_ij

t_j is what enters the MoE block. In the paper the mean is sum over i of A_ij / (L - j): without
padding or a window exactly L - j queries see key j. The columns of A are summed, not its rows,
which all sum to 1.

Fast attention does not give A away. Its queries and keys pass through transformers' attention
function, though, after rotation and caching: there the scores of a chunk of queries are computed
once more, summed over queries and heads, and forgotten. Nothing of size L x L is kept.

    prefill   the columns of the tokens at hand, from the queries at hand (a chunk, if it comes in
              chunks); keys of a cache take part in the softmax
    decode    one query for each sequence: every token would be its own judge, so there is no mean

Long prefills are judged by a sample of their queries. Half of it are the last ones, since few
queries see the last tokens; the other half is spread over the rest and counts for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SINK = "_moepress_sink"  # attribute of an attention module: where its column means go
# Attention scores computed at a time, by type of device: on a CPU, 2 MB that stay in the cache.
CHUNK_SCORES = {"cpu": 1 << 19, "cuda": 1 << 24}
SAMPLED_QUERIES = 256  # of a longer prefill (docs/log.md has what that costs)


@dataclass
class Sink:
    """What one decoder layer hands from its attention to its experts within a forward."""

    shape: tuple[int, int] = (0, 0)  # sequences B and tokens Q of each, of the call in progress
    real: Tensor | None = None  # [B, Q] bool, which are no padding, if the layer is told; None: all
    columns: tuple[Tensor, Tensor] | None = None  # mean [B, Q] float32, real [B, Q] bool
    packed: bool = False  # several sequences lie in one: there is no telling whose a token is

    def begin(self, shape: tuple[int, int], real: Tensor | None, packed: bool) -> None:
        """A forward of the layer starts: what an earlier one left is void."""
        self.shape, self.real, self.columns, self.packed = shape, real, None, packed


def protected_tokens(hidden: Tensor, sink: Sink, share: float) -> Tensor | None:
    """The most important tokens of every sequence of a prefill.

    Args:
        hidden: [B * Q, H], what enters the MoE block.
        sink: of the layer; without attention in it the norm alone decides, and a warning says so.
        share: of a sequence's tokens, padding left out; rounded down, so that short chunks (of a
            prompt, or of guesses to verify) are not mostly protected.

    Returns:
        [B * Q] bool, or None where all tokens are alike: when decoding, or with sequences packed.
    """
    sequences, tokens = sink.shape
    if share * tokens < 1 or tokens < 2 or sink.packed or sequences * tokens != len(hidden):
        return None
    importance = hidden.abs().sum(-1, dtype=torch.float32).view(sequences, tokens)
    real = sink.real
    if sink.columns is None or sink.columns[0].shape != importance.shape:
        _say_that_norms_decide()
    else:
        mean, real = sink.columns
        importance *= mean
    if real is None:
        real = torch.ones_like(importance, dtype=torch.bool)
    count = (real.sum(1, keepdim=True) * share).floor()
    order = importance.masked_fill(~real, -1).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(tokens, device=order.device).expand_as(order))
    return ((place < count) & real).flatten()


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
    """How much the queries at hand attend to each token at hand: column means of the softmax.

    Args:
        query: [B, heads, Q, D], rotated.
        key: [B, key heads, K, D], K >= Q: cached keys and those of the tokens at hand. Each key
            head serves heads / key heads neighbouring query heads.
        mask: bool [B or 1, heads or 1, Q, K], true where a query may look, or the same as numbers
            to add; None: causal, and if K > Q only the first Q keys are in use.
        scaling: of the scores; None: D ** -0.5.
        bias: [B or 1, heads or 1, Q, K], added to the scores.
        queries: sample about this many queries (`sampled_queries`); None: all.

    Returns:
        Mean [B, Q] float32 of A_ij over heads and the queries i that see j (0 where none does), and
        which tokens are no padding, [B, Q] bool.
    """
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1:3]
    own, seen = own_columns(query, keys, mask)  # [Q], [B, Q]
    rows, counts = _sampled(seen, queries, mask is not None)  # [1 or B, S]
    total = query.new_zeros((batch, keys), dtype=torch.float32)
    asked = torch.zeros_like(total)
    # float32: torch's bfloat16 products take eight times as long on CPUs without AMX.
    q = _take(query, rows).float() * (width**-0.5 if scaling is None else scaling)
    k = key.float().transpose(2, 3)
    most = CHUNK_SCORES.get(query.device.type, CHUNK_SCORES["cuda"])
    step = max(1, most // (batch * heads * keys))
    for start in range(0, rows.shape[1], step):
        chunk, count = rows[:, start : start + step], counts[:, None, start : start + step]
        # Without a mask, keys behind the chunk's last query are hidden from all of it.
        here = keys if mask is not None else min(keys, int(chunk[0, -1]) + 1)
        asks = seen.gather(1, chunk.expand(batch, -1))
        visible = _visible(mask, chunk, own, here) & asks[:, None, :, None]  # [B, h, c, here]
        # Heads of a group one by one: [B, groups, heads / groups * c, D].
        part = q[:, :, start : start + step].reshape(batch, groups, -1, width)
        scores = (part @ k[..., :here]).view(batch, heads, -1, here)
        if mask is not None and mask.is_floating_point():
            scores += _take(mask, chunk)
        if bias is not None:
            scores += _take(bias, chunk)[..., :here]
        weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
        weights.nan_to_num_(0.0)  # a row that sees nothing
        total[:, :here] += (count @ weights.sum(1))[:, 0]
        asked[:, :here] += (count @ visible.float().mean(1))[:, 0]
    return (total / (heads * asked.clamp(min=1e-9)))[:, own], seen


def sampled_queries(
    length: int, queries: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which queries of a prefill are asked, and for how many each stands.

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


def _sampled(seen: Tensor, queries: int | None, masked: bool) -> tuple[Tensor, Tensor]:
    """`sampled_queries` of every sequence, padding left out: [1 or B, S] indices and counts."""
    length = seen.shape[1]
    if not masked or queries is None or length <= queries or bool(seen.all()):
        rows, counts = sampled_queries(length, queries, seen.device)
        return rows[None], counts[None]
    real_first = seen.int().argsort(dim=1, descending=True, stable=True)  # [B, Q]
    index = torch.zeros((len(seen), queries), dtype=torch.int64, device=seen.device)
    weight = torch.zeros(index.shape, device=seen.device)  # 0: fewer real tokens than queries
    for row, tokens in enumerate(seen.sum(1).tolist()):
        rows, counts = sampled_queries(tokens, queries, seen.device)
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
    """As `column_means`, where attention weights [B, heads, Q, K] are at hand."""
    own, seen = own_columns(weights, weights.shape[3], mask)
    rows = torch.arange(weights.shape[2], device=weights.device)[None]
    visible = _visible(mask, rows, own, weights.shape[3]) & seen[:, None, :, None]
    total = weights.float().masked_fill(~visible, 0).sum((1, 2))
    count = visible.sum(2).float().mean(1)
    return (total / (weights.shape[1] * count.clamp(min=1)))[:, own], seen


def own_columns(query: Tensor, keys: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the tokens at hand stand among the keys, and which are no padding.

    A dynamic cache has them last, a static one behind those that came before, with free places
    following. What tells is the last query's mask: the last key it sees is its own.

    Args:
        query: [B, heads, Q, anything].
        keys: K.
        mask: as of `column_means`.

    Returns:
        [Q] int64, and [B, Q] bool.
    """
    batch, _, length, _ = query.shape
    at = torch.arange(length, device=query.device)
    if mask is None:
        return at, torch.ones((batch, length), dtype=torch.bool, device=query.device)
    seen = _as_bool(mask).any(1)  # [B or 1, Q, K]
    if keys > length:
        places = torch.arange(keys, device=query.device)
        last = (seen[:, -1] * places).amax()  # a 0-d tensor: reading it would stall a GPU
        at = (at + last - (length - 1)).clamp(min=0)
    itself = seen.gather(2, at.expand(len(seen), -1)[..., None])[..., 0]
    return at, itself.expand(batch, -1)


def _as_bool(mask: Tensor) -> Tensor:
    """What may be seen, of a mask of numbers to add; those of masked keys are huge."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _visible(mask: Tensor | None, rows: Tensor, own: Tensor, keys: int) -> Tensor:
    """[B or 1, heads or 1, S, keys] bool: which of the queries may look at which key."""
    if mask is not None:
        return _as_bool(_take(mask, rows))
    return (torch.arange(keys, device=rows.device) <= own[rows[0], None])[None, None]


# How attention is overheard


def listen(layer: nn.Module, sink: Sink) -> list[Callable[[], None]]:
    """Have a decoder layer's attention fill `sink` at every prefill.

    transformers looks attention up by name. The function named `sdpa` is exchanged once, for good,
    by one that also looks for a sink and otherwise does what it did. Eager attention returns its
    weights, and they are read there. Under other names (flash, flex), and in layers without softmax
    attention, nothing is heard.

    Returns:
        Calls that undo it.
    """
    _overhear_sdpa()
    undo: list[Callable[[], None]] = []
    undo.append(layer.register_forward_pre_hook(partial(_begin, sink), with_kwargs=True).remove)
    for module in layer.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            setattr(module, SINK, sink)
            undo.append(partial(delattr, module, SINK))
            hook = module.register_forward_hook(partial(_read_weights, sink), with_kwargs=True)
            undo.append(hook.remove)
    return undo


def _begin(sink: Sink, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a decoder layer runs."""
    states = args[0] if args else kwargs["hidden_states"]
    shape = states.shape[0], states.shape[1]
    mask = kwargs.get("attention_mask")  # of one number for each token, where there is no softmax
    real = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shape[1]:
        real = mask[:, mask.shape[1] - shape[1] :].bool()
    sink.begin(shape, real, packed=kwargs.get("cu_seq_lens_q") is not None)


def _overhear_sdpa() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(original, "overheard", False):
        return

    @wraps(original)
    def sdpa(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        sink = getattr(module, SINK, None)
        # A single query is decoding; a mask of None without causality hides nothing from anyone.
        if sink is not None and query.shape[2] > 1 and kwargs.get("is_causal") is not False:
            sink.columns = column_means(
                query,
                key,
                mask,
                kwargs.get("scaling"),
                bias=kwargs.get("position_bias"),
                queries=SAMPLED_QUERIES,
            )
        return original(module, query, key, value, mask, **kwargs)

    sdpa.overheard = True  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)


def _read_weights(
    sink: Sink, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """After an attention module ran: an eager one gives (output, weights [B, heads, Q, K])."""
    weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
    if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[2] > 1:
        sink.columns = means_of_weights(weights, kwargs.get("attention_mask"))


@cache
def _say_that_norms_decide() -> None:
    logger.warning(
        "Some layers do not show what their attention looks at (linear attention, or another "
        "implementation than sdpa and eager): which tokens keep all experts there is decided by "
        "their norm alone. Where the model has softmax attention, load it with "
        "attn_implementation='sdpa'."
    )
