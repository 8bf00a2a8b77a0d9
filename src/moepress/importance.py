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

Long prefills are judged by an even sample of their queries, the last among them.
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
CHUNK_SCORES = 1 << 22  # attention scores computed at a time: 16 MB in float32
SAMPLED_QUERIES = 128  # of a longer prefill (docs/log.md has what that costs)


@dataclass
class Sink:
    """What one decoder layer hands from its attention to its experts within a forward."""

    shape: tuple[int, int] = (0, 0)  # sequences B and tokens Q of each, of the call in progress
    columns: tuple[Tensor, Tensor] | None = None  # mean [B, Q] float32, real [B, Q] bool
    packed: bool = False  # several sequences lie in one: there is no telling whose a token is

    def begin(self, shape: tuple[int, int], packed: bool) -> None:
        """A forward of the layer starts: what an earlier one left is void."""
        self.shape, self.columns, self.packed = shape, None, packed


def protected_tokens(hidden: Tensor, sink: Sink, share: float) -> Tensor | None:
    """The most important tokens of every sequence of a prefill.

    Args:
        hidden: [B * Q, H], what enters the MoE block.
        sink: of the layer; without attention in it, the norm alone decides.
        share: of a sequence's tokens, padding left out; rounded up.

    Returns:
        [B * Q] bool, or None where all tokens are alike: when decoding, or with sequences packed.
    """
    sequences, tokens = sink.shape
    if share <= 0 or tokens < 2 or sink.packed or sequences * tokens != len(hidden):
        return None
    importance = hidden.abs().sum(-1, dtype=torch.float32).view(sequences, tokens)
    if sink.columns is None:
        real = torch.ones_like(importance, dtype=torch.bool)
    else:
        mean, real = sink.columns
        importance = (importance * mean).masked_fill(~real, -1)
    count = (real.sum(1, keepdim=True) * share).ceil()
    order = importance.argsort(dim=1, descending=True, stable=True)
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
        queries: at most this many queries, evenly spaced, the last among them; None: all.

    Returns:
        Mean [B, Q] float32 of A_ij over heads and the queries i that see j (0 where none does), and
        which tokens are no padding, [B, Q] bool.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    own, seen = own_columns(query, key.shape[2], mask)  # [Q], [B, Q]
    total = query.new_zeros((batch, key.shape[2]), dtype=torch.float32)
    count = torch.zeros_like(total)
    rows = _rows(length, queries, query.device)
    step = max(1, CHUNK_SCORES // (batch * heads * key.shape[2]))
    for chunk in torch.split(rows, step):
        # Without a mask the keys behind the last query of the chunk are hidden from all of it.
        keys = key if mask is not None else key[:, :, : int(chunk[-1]) + 1]
        here = keys.shape[2]
        visible = _visible(mask, chunk, own, here) & seen[:, None, chunk, None]  # [B, h, c, here]
        q = query[:, :, chunk].reshape(batch, groups, -1, width)  # heads of a group one by one
        scores = (q @ keys.transpose(2, 3)).float().view(batch, heads, -1, here) * scaling
        if mask is not None and mask.is_floating_point():
            scores = scores + mask[:, :, chunk]
        if bias is not None:
            scores = scores + bias[:, :, chunk, :here]
        scores = scores.masked_fill_(~visible, -torch.inf)
        weights = scores.softmax(-1).nan_to_num_(0.0)  # a row that sees nothing gives 0
        total[:, :here] += weights.sum((1, 2))
        count[:, :here] += visible.sum(2).float().mean(1)
    mean = (total / (heads * count.clamp(min=1)))[:, own]
    return mean, seen


def means_of_weights(weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `column_means`, where attention weights [B, heads, Q, K] are at hand."""
    own, seen = own_columns(weights, weights.shape[3], mask)
    rows = torch.arange(weights.shape[2], device=weights.device)
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


def _rows(length: int, queries: int | None, device: torch.device) -> Tensor:
    """Indices of the queries that are asked, rising."""
    step = 1 if queries is None else -(-length // queries)
    return torch.arange(length - 1, -1, -step, device=device).flip(0)


def _as_bool(mask: Tensor) -> Tensor:
    """What may be seen, of a mask of numbers to add; those of masked keys are huge."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _visible(mask: Tensor | None, rows: Tensor, own: Tensor, keys: int) -> Tensor:
    """[B or 1, heads or 1, rows, keys] bool: which query may look at which key."""
    if mask is not None:
        return _as_bool(mask[:, :, rows])
    return (torch.arange(keys, device=rows.device) <= own[rows, None])[None, None]


# How attention is overheard


def listen(layer: nn.Module, sink: Sink) -> list[Callable[[], None]]:
    """Have a decoder layer's attention fill `sink` at every prefill.

    transformers looks attention up by name. The function named `sdpa` is exchanged once, for good,
    by one that also looks for a sink and otherwise does what it did. Eager attention returns its
    weights, and they are read there. Under other names (flash, flex), and in layers without softmax
    attention, the norm alone decides; for the names a warning says so.

    Returns:
        Calls that undo it.
    """
    _overhear_sdpa()
    undo: list[Callable[[], None]] = []
    undo.append(layer.register_forward_pre_hook(_begin(sink), with_kwargs=True).remove)
    for module in layer.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation == "eager":
            undo.append(module.register_forward_hook(_read_weights(sink), with_kwargs=True).remove)
        elif implementation == "sdpa":
            setattr(module, SINK, sink)
            undo.append(partial(delattr, module, SINK))
        elif implementation is not None:
            _warn_that_norms_decide(implementation)
    return undo


def _begin(sink: Sink) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        sink.begin((states.shape[0], states.shape[1]), kwargs.get("cu_seq_lens_q") is not None)

    return hook


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


def _read_weights(sink: Sink) -> Callable[..., None]:
    """For eager attention modules: (output, weights [B, heads, Q, K]) come out of them."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[2] > 1:
            sink.columns = means_of_weights(weights, kwargs.get("attention_mask"))

    return hook


@cache
def _warn_that_norms_decide(implementation: str) -> None:
    logger.warning(
        "Attention of implementation '%s' does not show its scores: which tokens keep all experts "
        "is decided by their norm alone. Load the model with attn_implementation='sdpa' to count "
        "attention too.",
        implementation,
    )
