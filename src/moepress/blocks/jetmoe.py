"""JetMoE: the block itself holds the matrices of its experts, and sorts the tokens by expert.

Attention has experts too (`JetMoeMoA`), whose queries and outputs are not those of an MLP. They are
not packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moepress.blocks.adapter import AdaptedExperts, changed
from moepress.blocks.form import Form
from moepress.blocks.layout import Part


class _Block:
    """Replaces the forward of `JetMoeMoE`."""

    packed_away = ("input_linear", "output_linear")  # not needed once `experts` is packed

    def forward(self: Any, layer_input: Tensor) -> Tensor:
        flat = layer_input.reshape(-1, self.input_size)
        logits = self.router.layer(flat).float()
        chosen, index = logits.topk(self.router.top_k, dim=1)
        weights = torch.softmax(chosen, dim=1).type_as(flat)
        output: Tensor = self.experts(flat, index, weights).view_as(layer_input) + self.bias
        return output


class _Experts(AdaptedExperts, nn.Module):
    """The experts of a `JetMoeMoE`: has no parameters, and reads those of the block."""

    block: Any

    def __init__(self, block: Any) -> None:
        nn.Module.__init__(self)
        self.act_fn = block.activation
        self.num_experts = len(block.output_linear.weight)
        self.__dict__["block"] = block  # not as a submodule: the block holds this module

    def moepress_form(self, path: str) -> Form:
        above = path.rpartition(".")[0]
        experts, hidden, inner = self.block.output_linear.weight.shape
        gate_up = Part((f"{above}.input_linear.weight",))
        down = Part((f"{above}.output_linear.weight",))
        return Form(experts, hidden, inner, gate_up, down)

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.block.input_linear.weight[expert], self.block.output_linear.weight[expert]


def adapt(block: Any) -> None:
    """Adapt a `JetMoeMoE`."""
    if not isinstance(block, _Block):
        changed(block, _Block)
        block.experts = _Experts(block)
