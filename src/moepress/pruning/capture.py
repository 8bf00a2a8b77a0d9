"""Hooks that capture the column means of a decoder layer's attention, for `importance.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from moepress.pruning import importance
from moepress.pruning.importance import AttentionRecord, means_of_weights

RECORD = "_moepress_attention_record"  # attribute of an attention module


def capture_attention(layer: nn.Module, record: AttentionRecord) -> list[Callable[[], None]]:
    """Have a decoder layer's attention fill `record` at every prefill.

    transformers looks attention functions up by name. The function named `sdpa` is replaced once,
    for the rest of the process, by one that also fills the record of the module, if it has one.
    Eager attention returns its weights, and a hook reads them. Other implementations (flash, flex)
    and layers without softmax attention fill no column means.

    Returns:
        Calls that undo it.
    """
    _replace_sdpa()
    undo: list[Callable[[], None]] = []
    undo.append(layer.register_forward_pre_hook(partial(_begin, record), with_kwargs=True).remove)
    for module in layer.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            setattr(module, RECORD, record)
            undo.append(partial(delattr, module, RECORD))
            hook = module.register_forward_hook(partial(_read_weights, record), with_kwargs=True)
            undo.append(hook.remove)
    return undo


def _begin(
    record: AttentionRecord, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a decoder layer runs: start its record."""
    states = args[0] if args else kwargs["hidden_states"]
    shape = states.shape[0], states.shape[1]
    mask = kwargs.get("attention_mask")  # layers without softmax get one number per token
    real = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shape[1]:
        real = mask[:, mask.shape[1] - shape[1] :].bool()
    record.begin(shape, real, packed=kwargs.get("cu_seq_lens_q") is not None)


def _replace_sdpa() -> None:
    """Make transformers' `sdpa` fill records. Safe to repeat."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(original, "fills_records", False):
        return

    @wraps(original)
    def sdpa(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        record = getattr(module, RECORD, None)
        # A single query is decoding. Attention that is not causal is left alone: there a mask of
        # None hides nothing from anyone, while `column_means` takes it for a causal one.
        if record is not None and query.shape[2] > 1 and kwargs.get("is_causal") is not False:
            record.columns = importance.column_means(
                query,
                key,
                mask,
                kwargs.get("scaling"),
                bias=kwargs.get("position_bias"),
                queries=importance.SAMPLED_QUERIES,
            )
        return original(module, query, key, value, mask, **kwargs)

    sdpa.fills_records = True  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)


def _read_weights(
    record: AttentionRecord,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> None:
    """After an attention module ran: eager ones return (output, weights [B, heads, Q, K])."""
    weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
    if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[2] > 1:
        record.columns = means_of_weights(weights, kwargs.get("attention_mask"))
