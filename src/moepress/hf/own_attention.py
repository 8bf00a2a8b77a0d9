"""Attention of one token: our kernel in the place of PyTorch's.

For one token and a mask, transformers' "sdpa" copies keys and values, once for each query head that
shares them, before it calls PyTorch (releases before `pack_gqa`, and compiled models). The op
`moepress::attention` reads them once, where the cache has them.

The function that transformers calls by the name "sdpa" is wrapped. It does what it did, but for
marked modules and for calls that the op takes: so configs keep the name "sdpa", masks are made as
ever, and nothing changes for models that moepress did not load. Modules on cards are marked when a
model is loaded (`attend_on_card`), those on CPUs while a step is captured (fused_attention.py).

On a card the first call of each kind in a process is computed both ways. Where the results are not
close, one warning says so, and calls of that kind stay transformers'.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moepress.kernels import attention, backend_for
from moepress.kernels.cpu.attention import takes as cpu_takes
from moepress.kernels.cuda.attention import takes as card_takes

NAME = "sdpa"
CARD, CPU = "cuda", "cpu"  # types of devices, and names of their backends
MARK = "_moepress_attends"  # attribute of marked modules: the type of device of their tensors
HANDED_ON = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
CHANGING = ("softcap", "s_aux", "output_attentions")  # beside what the function itself names

CLOSE = 0.02  # of the norm: both round to 16 bits, in other places

logger = logging.getLogger(__name__)

Kind = tuple[torch.device, torch.dtype, int, int, int, torch.dtype | None]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def attend_on_card(model: nn.Module) -> None:
    """Have the causal attention of a model, where it is on a card, decode with our kernel.

    Only calls of one token change, without gradients, dropout, and arguments that the kernel does
    not know. Safe to repeat.
    """
    mark(causal_attention(model, (CARD,)))


def causal_attention(model: nn.Module, devices: Sequence[str]) -> list[nn.Module]:
    """The causal attention modules of a model on devices of some types that have a kernel."""
    return [module for module in model.modules() if _device_type(module) in devices]


def mark(modules: Iterable[nn.Module]) -> None:
    """Have modules, some of `causal_attention`, decode with our kernel."""
    for module in modules:
        setattr(module, MARK, _device_type(module))
        _wrap()


def unmark(modules: Iterable[nn.Module]) -> None:
    """Have marked modules decode as before."""
    for module in modules:
        delattr(module, MARK)


def marked(module: nn.Module) -> bool:
    return bool(getattr(module, MARK, None))


def _device_type(module: nn.Module) -> str | None:
    """The type of the device of causal attention, if it has a kernel of its own."""
    config = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation") or not getattr(module, "is_causal", False):
        return None
    device = next((p.device for p in module.parameters()), None)
    if device is None or device.type not in (CARD, CPU) or backend_for(device).name != device.type:
        return None
    return device.type


def _wrap() -> None:
    """Put our function in the place of transformers'."""
    from transformers.modeling_utils import AttentionInterface

    plain = AttentionInterface._global_mapping[NAME]
    if getattr(plain, MARK, False):
        return
    attend = wrapped(plain)
    setattr(attend, MARK, True)
    AttentionInterface.register(NAME, attend)


def wrapped(plain: Attend) -> Attend:
    """The function for "sdpa", in front of transformers' own."""
    named = set(inspect.signature(plain).parameters) - HANDED_ON - {"kwargs"}
    others = (*sorted(named), *CHANGING)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # For one token is_causal changes nothing: it sees all keys that the mask shows.
        ours = (
            marked(module)
            and not dropout
            and not any(_given(kwargs.get(name)) for name in others)
            and _fit(module, query, key, value, attention_mask)
        )
        as_before = partial(
            plain, module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        if not ours:
            return as_before()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        by_kernel = partial(attention, query, key, value, attention_mask, scale)
        if query.device.type != CARD:  # captured steps are compared as a whole
            return by_kernel(), None
        kind = _kind(query, key, attention_mask)
        if kind not in _agreed and _can_compare(query):
            expected = as_before()
            far = _distance(by_kernel(), expected[0])
            if math.isfinite(far):  # else another call decides
                _agreed[kind] = _close(far, kind)
            return expected
        return (by_kernel(), None) if _agreed.get(kind, True) else as_before()

    return attend


_agreed: dict[Kind, bool] = {}  # kinds of calls of which one was compared


def _kind(query: Tensor, key: Tensor, mask: Tensor | None) -> Kind:
    """Calls of one kind run the same kernels, but for the number of positions."""
    _, heads, _, size = query.shape
    of_mask = None if mask is None else mask.dtype
    return query.device, query.dtype, heads, key.shape[1], size, of_mask


def _can_compare(query: Tensor) -> bool:
    """Whether a call may be compared, for which the host waits for the card."""
    if torch.compiler.is_compiling():
        return False
    return not (query.is_cuda and torch.cuda.is_current_stream_capturing())


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; not finite where that says nothing."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _close(far: float, kind: Kind) -> bool:
    if far < CLOSE:
        return True
    logger.warning(
        "Attention of one token differs by %.2g between moepress's kernel and PyTorch's (%s). "
        "PyTorch's is used. Please report this.", far, kind,
    )  # fmt: skip
    return False


def _given(value: object) -> bool:
    return value is not None and value is not False


def _fit(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes what PyTorch would for these tensors."""
    if query.dim() != 4 or query.shape[2] != 1 or key.shape != value.shape or not key.shape[2]:
        return False
    batches, heads, _, size = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    if (key.shape[0], key.shape[1] * groups, key.shape[3]) != (batches, heads, size):
        return False
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    here = query.device
    if here.type != getattr(module, MARK, None) or any(x.device.type != here.type for x in tensors):
        return False
    if mask is not None and (
        mask.dim() != 4
        or mask.shape[0] not in (1, batches)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2] != 1
        or mask.shape[3] not in (1, key.shape[2])
    ):
        return False
    takes = card_takes if here.type == CARD else cpu_takes
    return takes(query, key, value, mask) and not _followed(tensors)


def _followed(tensors: tuple[Tensor, ...]) -> bool:
    """Whether gradients, autocast or function transforms want to see PyTorch's own op."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    if torch.is_autocast_enabled(tensors[0].device.type):
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
