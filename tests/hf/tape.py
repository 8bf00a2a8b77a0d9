"""CUDA graphs for tests, without a card.

A `tape` records the ops of a piece of work and repeats them with the tensors that they had, as a
CUDA graph does: what Python decided when it was recorded stays decided, and what was computed is
written to the same memory. An op for which the host would wait for the card is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moepress.hf.cuda_graph import Graph

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
    "unique_consecutive", "bincount",
}  # fmt: skip


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name.partition("::")[2] in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def tape(work: Callable[[], Tensor], device: torch.device) -> Graph:
    """In place of `cuda_graph`: on any device on which torch runs the ops of `work`."""
    for _ in range(2):
        work()
    recorder = _Recorder()
    with recorder:
        result = work()

    def replay() -> None:
        for func, args, kwargs, out in recorder.ops:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)

    return Graph(result, replay)
