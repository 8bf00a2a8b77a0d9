"""The routed experts of a layer, some on a card and the others in the machine's memory.

Both halves know all experts by the same numbers, and have 0 bits of those that the other one holds
(expert_shards.py), so a choice costs nothing in the half that lacks its expert. Weights stay where
they are: hidden states, choices and routing weights go to the CPU, a sum comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moepress.kernels.modules import PackedExperts
from moepress.kernels.stores import StoredLayer

Activations = tuple[Tensor, ...]


class DividedExperts(nn.Module):
    """`PackedExperts` of which two devices compute a half each. Called in the same way.

    Args:
        card: the experts on the card, where the layer's activations are.
        host: the others, on the CPU.
    """

    def __init__(self, card: PackedExperts, host: PackedExperts) -> None:
        super().__init__()
        self.card = card
        self.host = host
        self.num_experts = card.num_experts
        self.left_out = tuple(sorted({*card.left_out} & {*host.left_out}))
        # [E + 2] bool: whether an expert is in the host's half; the last two are no experts.
        self._on_host = torch.ones(self.num_experts + 2, dtype=torch.bool, device="cpu")
        self._on_host[[*host.left_out, self.num_experts, self.num_experts + 1]] = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it waits for the card
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        given = hidden_states, top_k_index, top_k_weights
        arrived = start_crossing(given)
        y: Tensor = self.card(*given)  # only queued, on a card: the CPU computes meanwhile
        x, index, weights = arrived()
        if not self._on_host[index.clamp(-1, self.num_experts)].any():
            return y
        rest: Tensor = self.host(x, index, weights)
        return y + rest.to(y.device, non_blocking=True)

    @property
    def stored(self) -> StoredLayer | None:
        """Where the packed matrices of the host's half are, as of `PackedExperts`."""
        return self.host.stored

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DividedExperts:
        """Move and cast the card's half. The host's follows a cast, and stays on the CPU."""
        self.card._apply(fn, recurse)
        self.host._apply(lambda x: x.to(fn(x.new_empty(0)).dtype), recurse)
        return self


def start_crossing(given: Activations) -> Callable[[], Activations]:
    """Start to copy activations to the CPU, before further work is queued on their device.

    Returns:
        A function that waits for the copies, but not for that work, and returns them.
    """
    copies = tuple(x.to("cpu", non_blocking=True) for x in given)  # pinned, so not blocking
    device = given[0].device
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def arrived() -> Activations:
        if copied is not None:
            copied.synchronize()
        return copies

    return arrived


def packed_experts(module: nn.Module) -> dict[str, Any]:
    """The packed experts inside a module, by path: divided ones as one, without their halves."""
    found: dict[str, Any] = {
        path: one
        for path, one in module.named_modules()
        if isinstance(one, PackedExperts | DividedExperts)
    }
    halves = {id(half) for one in found.values() for half in one.children()}
    return {path: one for path, one in found.items() if id(one) not in halves}
