"""The small functions of a model by our kernels, while a step of one token is captured.

transformers writes a norm, a rotary embedding, a router as several operations of torch. For one
token each takes longer to launch than to compute. What a function computes is found by trying it
on random inputs; one of which that is not known stays. Captured steps are compared with the plain
way too (captured.py), so that is where functions are replaced, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from moepress.hf.fused_attention import fused_attention
from moepress.hf.fused_linears import fused_linears
from moepress.hf.fused_norms import fused_norms
from moepress.hf.fused_rotary import fused_rotary
from moepress.hf.fused_router import fused_routers

Fusion = Callable[[nn.Module, Sequence[str]], AbstractContextManager[None]]
FUSIONS: tuple[Fusion, ...] = (
    fused_attention, fused_linears, fused_norms, fused_rotary, fused_routers,
)  # fmt: skip


@contextmanager
def fused(model: nn.Module, devices: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """While it is entered, small functions of a model are computed by one kernel each.

    Only those whose formula is known, found by trying, and only calls with few tokens and without
    gradients. Afterwards the model is as before.

    Args:
        model: of transformers, loaded.
        devices: types of devices on which functions are replaced.
    """
    with ExitStack() as stack:
        for fusion in FUSIONS:
            stack.enter_context(fusion(model, devices))
        yield
