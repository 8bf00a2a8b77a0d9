"""Packed linears with the same input as one product, while steps are captured.

Queries, keys and values are three products of the same hidden states, gate and up of a shared
expert two. One by one, each rounds the input anew, and a small matrix fills a part of the card.
CPUs gain nothing. Which linears belong together is seen in the first forward pass: those that get
the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.hf.trying import MOST_TOKENS
from moepress.kernels.cuda.several import MOST
from moepress.kernels.modules import PackedLinear


@contextmanager
def fused_linears(model: nn.Module, devices: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """While it is entered, linears of a model that get the same few tokens are one op.

    The first forward pass is as ever: until a linear is called again. So are calls with gradients
    or many tokens. Nobody may change a tensor between the calls of two linears that get it.

    Args:
        model: of transformers, loaded.
        devices: types of devices on which linears are changed.
    """
    linears = [
        m
        for m in model.modules()
        if isinstance(m, PackedLinear)
        and m.joins
        and m.weight.device.type in devices
        and kernels.backend_for(m.weight.device).linears is not None  # else it gains nothing
        and "forward" not in vars(m)
    ]
    passes = _Passes()
    for linear in linears:
        linear.forward = partial(passes.forward, linear)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


class _Passes:
    """Forward passes of a model: the first is watched, the others join what it showed."""

    def __init__(self) -> None:
        self._seen: dict[PackedLinear, Tensor] = {}  # of the first pass, in order
        self._groups: dict[PackedLinear, Sequence[PackedLinear]] | None = None  # by their first
        self._ready: dict[PackedLinear, tuple[Tensor, Tensor]] = {}  # input and result

    def forward(self, linear: PackedLinear, x: Tensor) -> Tensor:
        if self._groups is None:
            if linear not in self._seen:
                self._seen[linear] = x
                return PackedLinear.forward(linear, x)
            self._groups = _groups(self._seen)
            self._seen.clear()
        given, y = self._ready.pop(linear, (None, None))
        if given is x and y is not None:
            return y
        group = self._groups.get(linear)
        few = x.numel() <= MOST_TOKENS * x.shape[-1] and not torch.is_grad_enabled()
        if group is None or not few:
            return PackedLinear.forward(linear, x)
        first, *others = _products(group, x)
        for other, product in zip(group[1:], others, strict=True):
            self._ready[other] = x, product
        return first


def _groups(seen: dict[PackedLinear, Tensor]) -> dict[PackedLinear, Sequence[PackedLinear]]:
    """Linears that got the same tensor and have codes of one kind, by the first of each group."""
    alike: dict[Any, list[PackedLinear]] = {}
    for linear, x in seen.items():
        kind = id(x), linear.codec.group_size, linear.activation_bits
        alike.setdefault(kind, []).append(linear)
    groups = [f[i : i + MOST] for f in alike.values() for i in range(0, len(f), MOST)]
    return {group[0]: group for group in groups if len(group) > 1}


def _products(group: Sequence[PackedLinear], x: Tensor) -> Sequence[Tensor]:
    first = group[0]
    rows = [linear.out_features for linear in group]
    y: Tensor = kernels.linears(
        x,
        [linear.weight for linear in group],
        rows,
        [linear.codec.number for linear in group],
        first.codec.group_size,
        first.activation_bits,
        first.codec.family,
    )
    return torch.split(y, rows, -1)
