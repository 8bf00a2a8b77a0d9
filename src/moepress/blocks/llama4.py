"""Llama 4: every expert is called with all tokens, and the router's score scales its input.

y_t = sum over the chosen e of f_e(s_te x_t)        s_te = sigmoid of the router's logit
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moepress.blocks.adapter import AdaptedExperts, changed
from moepress.blocks.form import Form
from moepress.blocks.layout import Part


class _Block:
    """Replaces the forward of `Llama4TextMoe`."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)  # [N, E]; 0 where an expert is not chosen
        weights, index = scores.topk(self.top_k, dim=1)
        return self.shared_expert(hidden) + self.experts(hidden, index, weights), logits


class _Experts(AdaptedExperts):
    """`Llama4TextExperts`: gate_up_proj [E, H, 2I] and down_proj [E, I, H]."""

    gate_up_proj: Tensor
    down_proj: Tensor
    scales_input = True

    def moepress_form(self, path: str) -> Form:
        experts, inner, hidden = self.down_proj.shape
        gate_up = Part((f"{path}.gate_up_proj",), transposed=True)
        down = Part((f"{path}.down_proj",), transposed=True)
        return Form(experts, hidden, inner, gate_up, down, scales_input=True)

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj[expert].T, self.down_proj[expert].T


def adapt(block: Any) -> None:
    """Adapt a `Llama4TextMoe`."""
    changed(block, _Block)
    if type(block.experts).__name__ == "Llama4TextExperts":  # not packed
        changed(block.experts, _Experts)
