"""LongCat-Flash: beside E experts with weights, a token may choose experts that return their input.

The indices of these identity experts are E and above, which are no expert to moepress.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moepress.blocks.adapter import AdaptedExperts, changed
from moepress.blocks.form import Form
from moepress.blocks.layout import Part


class _Block:
    """Replaces the forward of `LongcatFlashMoE`: adds the identity experts itself."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        *_, weights, index = self.router(hidden_states)  # from 5.19 on, logits first
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        identity = weights.masked_fill(index < self.config.n_routed_experts, 0).sum(1, keepdim=True)
        output = self.experts(flat, index, weights) + (flat * identity).to(flat.dtype)
        return output.view_as(hidden_states)  # type: ignore[no-any-return]


class _Experts(AdaptedExperts):
    """`LongcatFlashExperts`: gate_up_proj has entries for identity experts, which nothing uses."""

    gate_up_proj: Tensor
    down_proj: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.down_proj)

    def moepress_form(self, path: str) -> Form:
        experts, hidden, inner = self.down_proj.shape
        gate_up, down = Part((f"{path}.gate_up_proj",)), Part((f"{path}.down_proj",))
        return Form(experts, hidden, inner, gate_up, down)

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj[expert], self.down_proj[expert]


def adapt(block: Any) -> None:
    """Adapt a `LongcatFlashMoE`."""
    changed(block, _Block)
    if type(block.experts).__name__ == "LongcatFlashExperts":  # not packed
        changed(block.experts, _Experts)
