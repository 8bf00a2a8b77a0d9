"""How the blocks of families with another experts interface are adapted: by a change of class.

An adapter is a class with new methods. `changed` gives a module of the model a class that has these
methods and otherwise is the module's own. Parameters, submodules and their names stay, so that a
checkpoint is read as before, and hooks, devices and `named_modules` are not touched.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress.blocks.form import Form


def changed(module: nn.Module, adapter: type[Any]) -> None:
    """Give a module the methods and attributes of an adapter. Safe to repeat."""
    if not isinstance(module, adapter):
        module.__class__ = _mixed(type(module), adapter)  # type: ignore[arg-type]  # classes have a hash


@cache
def _mixed(kind: Any, adapter: Any) -> type[nn.Module]:
    # The name stays, because transformers finds classes that must not be split by their names.
    return type(kind.__name__, (adapter, kind), {"__module__": kind.__module__})


class AdaptedExperts:
    """Experts with a plain gate and no biases, called by transformers' experts interface.

    Subclasses have `moepress_form`, `matrices`, `act_fn` and `num_experts`.
    """

    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    scales_input = False

    act_fn: Any
    num_experts: Any  # E

    def moepress_form(self, path: str) -> Form:
        """The form of these experts, with parameter names below `path`."""
        raise NotImplementedError

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2I, H] and down [H, I] of one expert."""
        raise NotImplementedError

    def _apply_gate(self, first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        gated: Tensor = self.act_fn(gate) * up
        return gated

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted output [N, H] of the chosen experts. Other indices contribute nothing."""
        total = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            weight = top_k_weights[token, place, None].to(hidden_states.dtype)
            gate_up, down = self.matrices(expert)
            x = hidden_states[token]
            x = x * weight if self.scales_input else x
            y = F.linear(self._apply_gate(F.linear(x, gate_up)), down)
            total.index_add_(0, token, y if self.scales_input else y * weight)
        return total
