"""Routers of few tokens in one launch: the op `moepress::route` in the place of their forward.

    with fused_routers(model):   # around the capture of a step
        model(...)

A router of transformers is five to fifteen small kernels on a card. Models differ in scores,
groups, scales, and in where they round. Which formula a module has is found by trying
(router_formula.py); where none fits, the module is left alone. Everything behind the router, such
as pruning, sees the same results as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from moepress.hf.router_formula import Way, find_way, routed
from moepress.hf.router_parts import RouterParts, parts_of
from moepress.hf.trying import MOST_TOKENS
from moepress.kernels import backend_for
from moepress.kernels.cuda.router import MOST_CHOSEN, MOST_EXPERTS
from moepress.kernels.router import FLOATS

logger = logging.getLogger(__name__)

CARD = "cuda"  # type of device


@contextmanager
def fused_routers(model: nn.Module, devices: Sequence[str] = (CARD,)) -> Iterator[None]:
    """While entered, routers of a model choose by one kernel, where they are known to be such.

    Only calls of up to `MOST_TOKENS` tokens in the dtype of the model, without gradients and
    autocast; others are computed as ever. Entering waits for the card.

    Args:
        model: of transformers.
        devices: types of devices on which routers are replaced.
    """
    replaced: list[nn.Module] = []
    known: dict[Any, Way | None] = {}
    try:
        for module in model.modules():
            parts = parts_of(module)
            if parts is None or not _suits(parts, devices):
                continue
            ways = _ways(module, parts, getattr(model, "dtype", parts.weight.dtype), known)
            if ways:
                module.forward = _Fused(module, parts, ways)
                replaced.append(module)
            else:
                logger.debug("%s computes by no known formula", type(module).__name__)
        yield
    finally:
        for module in replaced:
            del module.forward


def _suits(parts: RouterParts, devices: Sequence[str]) -> bool:
    """Whether there is a kernel for a router, where it is."""
    weight = parts.weight
    return (
        weight.device.type in devices
        and (weight.device.type != CARD or backend_for(weight.device).name == CARD)
        and len(weight) <= MOST_EXPERTS
        and weight.shape[1] % 8 == 0
        and parts.top_k <= MOST_CHOSEN
        and weight.is_contiguous()
        and all(p is None or p.tensor().is_contiguous() for p in (parts.bias, parts.correction))
    )


def _ways(
    module: nn.Module, parts: RouterParts, dtype: torch.dtype, known: dict[Any, Way | None]
) -> dict[torch.dtype, Way]:
    """How a router computes, for hidden states of the model's dtype and of its own.

    Args:
        known: by kind of router. Those that are found are added. All are verified for each module.
    """
    found = {}
    for one in dict.fromkeys((dtype, parts.weight.dtype)):
        if one not in FLOATS:
            continue
        kind = type(module), one, parts.weight.shape, parts.weight.dtype, parts.weight.device
        way = known.get(kind)
        if way is not None:
            way = find_way(module, parts, one, way)
        elif kind not in known:
            way = known[kind] = find_way(module, parts, one)
        if way is not None:
            found[one] = way
    return found


class _Fused:
    """The forward of a router while it is replaced."""

    def __init__(
        self, module: nn.Module, parts: RouterParts, ways: Mapping[torch.dtype, Way]
    ) -> None:
        self._module = module
        self._plain: Callable[..., Any] = module.forward
        self._parts = parts
        self._ways = ways
        self._made_for = parts.weight.dtype, parts.weight.shape
        update_wrapper(self, self._plain)  # its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(*args, **kwargs)
        if call is None:
            return self._plain(*args, **kwargs)
        hidden, correction, way = call
        flat = hidden.reshape(-1, hidden.shape[-1])
        return routed(flat, self._parts, correction, way.formula)

    def _call(
        self, hidden: Any = None, correction: Any = None, /, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None, Way] | None:
        """Hidden states, correction and way of a call that the op takes; None: it does not."""
        weight = self._parts.weight
        if more or named or not isinstance(hidden, Tensor):
            return None
        way = self._ways.get(hidden.dtype)
        if (
            way is None
            or hidden.dim() not in way.dims
            or hidden.shape[-1] != weight.shape[1]
            or hidden.numel() > MOST_TOKENS * weight.shape[1]
            or hidden.device != weight.device
            or (weight.dtype, weight.shape) != self._made_for
            or self._module.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(hidden.device.type)
        ):
            return None
        if self._parts.corrected != isinstance(correction, Tensor):
            return None
        if correction is not None and (
            correction.numel() != len(weight) or correction.dtype not in FLOATS
        ):
            return None
        return hidden, None if correction is None else correction.detach().flatten(), way
