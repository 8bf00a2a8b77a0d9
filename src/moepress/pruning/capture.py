"""Capture the column means of a decoder layer's attention while it runs, for `importance.py`.

Nothing is exchanged in transformers, and nothing is kept in the model: the record of a call lives
in the thread that makes the call, from the layer's start to its end. Inside, a TorchFunctionMode
sees the calls of PyTorch's `scaled_dot_product_attention`, whichever code makes them. Eager
attention returns its weights, and a hook reads them. Other implementations (flash, flex) and layers
without softmax attention give no column means.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moepress.pruning import importance
from moepress.pruning.importance import AttentionRecord, means_of_weights

CHECKPOINT = "_gradient_checkpointing_func"  # attribute of a layer, where transformers has set it
_RUNNING = threading.local()  # .call: of the layer that this thread is inside of


class _Call(TorchFunctionMode):
    """One call of a decoder layer. Inside its `with` block it fills its record."""

    def __init__(self, record: AttentionRecord) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            _read_attention(self.record, *args, **kwargs)
        return func(*args, **kwargs)


class _RecordedForward:
    """The forward of a decoder layer that records its calls.

    Set as attribute `forward` of the layer. Hooks would not do: after a KeyboardInterrupt they are
    not called.
    """

    def __init__(self, layer: nn.Module, share: float) -> None:
        self.layer = layer
        self.share = share
        self.before = layer.__dict__.get("forward")  # of accelerate, for example
        self.forward = layer.forward
        update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _begun(self.share, args, kwargs)
        if call is None:
            return self.forward(*args, **kwargs)
        checkpoint = vars(self.layer).get(CHECKPOINT)
        if checkpoint is None or not self.layer.training:
            return _recorded(call, self.forward, *args, **kwargs)
        # The backward pass runs what is inside of this forward again, in a record of its own.
        again = partial(_recorded_anew, checkpoint, call.record)
        setattr(self.layer, CHECKPOINT, again)
        try:
            return _recorded(call, self.forward, *args, **kwargs)
        finally:
            setattr(self.layer, CHECKPOINT, checkpoint)

    def attach(self) -> None:
        self.layer.forward = self

    def remove(self) -> None:
        """Restore the forward from before; if another one has replaced this one, only stop."""
        self.share = 0.0
        if self.layer.__dict__.get("forward") is self:
            del self.layer.forward
            if self.before is not None:
                self.layer.forward = self.before


def _recorded(call: _Call, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a forward, inside of which this thread has the record of a call."""
    outer = getattr(_RUNNING, "call", None)
    _RUNNING.call = call
    try:
        with call:
            return forward(*args, **kwargs)
    finally:
        _RUNNING.call = outer


def _recorded_anew(
    checkpoint: Callable[..., Any],
    record: AttentionRecord,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A layer's checkpoint function: each run of `forward` has an empty record like `record`."""

    def run(*args: Any) -> Any:
        return _recorded(_Call(replace(record, columns=None)), forward, *args)

    return checkpoint(run, *args, **kwargs)


def current_record() -> AttentionRecord | None:
    """The record of the layer that this thread is inside of; None: nothing is captured there."""
    call = getattr(_RUNNING, "call", None)
    return None if call is None else call.record


def capture_attention(layer: nn.Module, share: float) -> list[Callable[[], None]]:
    """Have a decoder layer's attention fill a record at every prefill.

    Args:
        share: of the tokens that are to be protected. Calls in which that is not one token are not
            recorded.

    Returns:
        Calls that undo it.
    """
    recorded = _RecordedForward(layer, share)
    recorded.attach()
    undo: list[Callable[[], None]] = [recorded.remove]
    for module in layer.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            hook = module.register_forward_hook(_read_weights, with_kwargs=True)
            undo.append(hook.remove)
    return undo


def _begun(share: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """A call of a decoder layer with an empty record; None: it protects no token.

    It does not in decoding, nor if several sequences are packed into one: their borders are
    unknown.
    """
    states: Tensor = args[0] if args else kwargs["hidden_states"]  # [B, Q, ...]
    shape = states.shape[0], states.shape[1]
    if shape[1] < 2 or share * shape[1] < 1 or kwargs.get("cu_seq_lens_q") is not None:
        return None
    mask = kwargs.get("attention_mask")  # layers without softmax get one number per token
    real = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shape[1]:
        real = mask[:, mask.shape[1] - shape[1] :].bool()
    return _Call(AttentionRecord(shape, real))


def _read_attention(
    record: AttentionRecord,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """Fill a record from the arguments of `scaled_dot_product_attention`.

    Attention that is not causal is left alone, and so is attention among other tokens than those of
    the layer's call.
    """
    if query.dim() != 4 or (query.shape[0], query.shape[2]) != record.shape:
        return
    if attn_mask is None and not is_causal:
        return
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    record.columns = importance.column_means(
        query, key, attn_mask, scale, queries=importance.SAMPLED_QUERIES
    )


def _read_weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """After an attention module ran: eager ones return (output, weights [B, heads, Q, K])."""
    record = current_record()
    weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
    if record is None or not isinstance(weights, Tensor) or weights.dim() != 4:
        return
    if (weights.shape[0], weights.shape[2]) == record.shape:
        record.columns = means_of_weights(weights, kwargs.get("attention_mask"))
