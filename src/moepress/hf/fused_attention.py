"""Attention of one token by our kernel, in the place of PyTorch's, while a step is captured.

own_attention.py says how, and which calls. A captured step's cache has room for more tokens, and a
mask hides it: the kernel reads the tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from moepress.hf.own_attention import causal_attention, mark, marked, unmark


@contextmanager
def fused_attention(model: nn.Module, devices: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """While it is entered, causal attention of a model calls `moepress::attention` for one token.

    Without gradients, dropout, and arguments that the kernel does not know. All other calls are
    computed as ever. Modules on cards that are loaded by moepress call it anyway, and stay so.

    Args:
        model: of transformers, loaded.
        devices: types of devices on which modules are changed.
    """
    changed = [m for m in causal_attention(model, devices) if not marked(m)]
    mark(changed)
    try:
        yield
    finally:
        unmark(changed)
