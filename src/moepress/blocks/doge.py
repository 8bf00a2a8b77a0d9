"""Doge: a token chooses neurons, single rows of two tables [I, H], in place of experts.

All neurons of a layer are one expert here, of which a token uses only those that it chooses
(`Form.by_neuron`). The tables stay `nn.Embedding`s and are packed as such, so a token still reads
no other rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moepress.blocks.adapter import AdaptedExperts, changed
from moepress.blocks.form import Form
from moepress.blocks.layout import Part
from moepress.errors import InputError
from moepress.format.codec import GROUP_SIZES, fitting_group_size


class _Block:
    """Replaces the forward of `DogeCDMoE`."""

    def forward(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        flat = hidden_states.reshape(-1, self.hidden_size)
        # Row t of x and of y are halves of the logits of two tokens, t / 2 and (T + t) / 2:
        # transformers keeps it so (modeling_doge.py).
        logits = self.router_gate(hidden_states).view(2, len(flat), -1)
        (of_x, of_y), (x, y) = logits.topk(self.num_keys, dim=-1)
        sums = (of_x.unsqueeze(-1) + of_y.unsqueeze(-2)).flatten(-2)
        pairs = (x.unsqueeze(-1) * self.num_keys + y.unsqueeze(-2)).flatten(-2)
        chosen, places = sums.topk(self.top_k, dim=-1)
        weights = torch.softmax(chosen, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        routed = self.experts(flat, pairs.gather(-1, places), weights).view_as(hidden_states)
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated) + routed, logits


class _Experts(AdaptedExperts, nn.Module):
    """The neurons of a `DogeCDMoE`: has no parameters, and reads those of the block."""

    has_gate = False
    block: Any

    def __init__(self, block: Any) -> None:
        nn.Module.__init__(self)
        self.act_fn = block.act_fn
        self.num_experts = block.num_experts  # an index of that and above is no neuron
        self.__dict__["block"] = block  # not as a submodule: the block holds this module

    def moepress_form(self, path: str) -> Form:
        """Their form.

        Raises:
            InputError: the rows of the tables cannot be packed.
        """
        above = path.rpartition(".")[0]
        neurons, hidden = self.num_experts, self.block.hidden_size
        if fitting_group_size(hidden, GROUP_SIZES[0]) is None:
            raise InputError(
                f"The tables of {above} have rows of {hidden} weights. Expected a multiple of 32: "
                "this model cannot be compressed."
            )
        first = Part((f"{above}.down_embed.weight",), flat=neurons)
        second = Part((f"{above}.up_embed.weight",), flat=neurons)
        return Form(1, hidden, neurons, first, second, gated=False, by_neuron=True)

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.block.down_embed.weight, self.block.up_embed.weight

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        real = (top_k_index >= 0) & (top_k_index < self.num_experts)
        index = top_k_index.masked_fill(~real, 0)
        first = torch.matmul(self.block.down_embed(index), hidden_states.unsqueeze(-1)).squeeze(-1)
        inner = self.act_fn(first) * top_k_weights.masked_fill(~real, 0)
        output: Tensor = torch.matmul(inner.unsqueeze(1), self.block.up_embed(index)).squeeze(1)
        return output


def adapt(block: Any) -> None:
    """Adapt a `DogeCDMoE`."""
    if not isinstance(block, _Block):
        changed(block, _Block)
        block.experts = _Experts(block)
