"""DBRX: the gate, up and down matrices of all experts are below each other, [E * I, H]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moepress.blocks.adapter import AdaptedExperts, changed
from moepress.blocks.form import Form
from moepress.blocks.layout import Part


class _Block:
    """Replaces the forward of `DbrxFFN`."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weights, index = self.route_tokens_to_experts(self.router(hidden_states))
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: Tensor = self.experts(flat, index, weights).view_as(hidden_states)
        return output


class _Experts(AdaptedExperts):
    """`DbrxExperts`: mlp.w1 (gate), mlp.v1 (up) and mlp.w2 (down, transposed), each [E * I, H]."""

    mlp: Any
    num_experts: int
    hidden_size: int
    ffn_hidden_size: int

    @property
    def act_fn(self) -> Any:
        return self.mlp.activation_fn

    def moepress_form(self, path: str) -> Form:
        inner = self.ffn_hidden_size
        gate_up = Part((f"{path}.mlp.w1", f"{path}.mlp.v1"), flat=inner)
        down = Part((f"{path}.mlp.w2",), transposed=True, flat=inner)
        return Form(self.num_experts, self.hidden_size, inner, gate_up, down)

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        form, mlp = self.moepress_form(""), self.mlp
        rows = slice(expert * self.ffn_hidden_size, (expert + 1) * self.ffn_hidden_size)
        return form.gate_up.matrix([mlp.w1[rows], mlp.v1[rows]]), mlp.w2[rows].T


def adapt(block: Any) -> None:
    """Adapt a `DbrxFFN`."""
    changed(block, _Block)
    if type(block.experts).__name__ == "DbrxExperts":  # not packed
        changed(block.experts, _Experts)
