"""Packed experts of forms that the op `moepress::experts` does not know by itself.

Three things may differ: the routing weight scales an expert's input, the hidden size is padded, or
a function that no `Gate` describes lies between the products or after them. The first two are
arithmetic around one call of the op. The last one takes two products for each expert that was
chosen, with the model's own function between them: correct, and slower than the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress import kernels
from moepress.format.codec import PackedSpec
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts
from moepress.kernels.reference import slots_by_expert
from moepress.kernels.stores import refuse


@dataclass(frozen=True)
class OwnFunctions:
    """What a model's own code computes in an expert.

    Attributes:
        between: from outputs [t, R] of the first product, gate rows first, to inputs [t, I] of
            down.
        after: from outputs [t, H] of down to those of the expert.
        modules: submodules that the functions call, by name. Their parameters are loaded and moved
            with the packed ones.
    """

    between: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor]
    modules: dict[str, nn.Module]


class UncommonExperts(PackedExperts):
    """`PackedExperts` of another form. Called in the same way.

    Args:
        hidden_size: H as the experts are called with.
        padded_size: H of the packed matrices.
        scales_input: y = f(w x) in place of w f(x), with the routing weight w.
        own: functions of the model; None: `gate` describes everything.
        num_experts, intermediate_size, gate_up, down, gate, gate_up_bias, down_bias: as of
            `PackedExperts`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        padded_size: int,
        intermediate_size: int,
        gate_up: PackedSpec,
        down: PackedSpec,
        gate: Gate,
        gate_up_bias: bool,
        down_bias: bool,
        *,
        scales_input: bool,
        own: OwnFunctions | None,
    ) -> None:
        super().__init__(
            num_experts,
            padded_size,
            intermediate_size,
            gate_up,
            down,
            gate,
            gate_up_bias,
            down_bias,
        )
        self.called_with = hidden_size
        self.scales_input = scales_input
        self.own = own
        for name, module in (own.modules if own else {}).items():
            self.add_module(name, module)

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        run: Any = super()._compute if self.own is None else self._expert_by_expert
        x = F.pad(hidden_states, (0, self.hidden_size - self.called_with))
        if not self.scales_input:
            y: Tensor = run(x, top_k_index, top_k_weights)
            return y[:, : self.called_with]
        k = top_k_index.shape[1]
        x = (x[:, None] * top_k_weights[..., None].to(x.dtype)).flatten(0, 1)  # [T k, H]
        ones = torch.ones_like(top_k_weights).view(-1, 1)
        y = run(x, top_k_index.reshape(-1, 1), ones)
        return torch.unflatten(y, 0, (-1, k)).sum(1)[:, : self.called_with]

    def _expert_by_expert(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert self.own is not None
        k, flat, stored = index.shape[1], weights.flatten(), self.stored
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(x.shape, dtype=wide)
        for expert, slots in slots_by_expert(index, self.num_experts):
            if expert in self.left_out:
                continue
            token = slots // k
            first, second = self._matrices(expert, x.dtype)
            with nullcontext() if stored is None else stored.store.hold(stored.layer, [expert]):
                y = second(self.own.between(first(x[token])))
            if stored is not None and y.requires_grad:
                _refuse_gradient(y)  # the expert may be gone from memory by then
            y = self.own.after(y[:, : self.called_with]).to(wide)
            y = F.pad(y * flat[slots, None].to(wide), (0, x.shape[1] - self.called_with))
            total.index_add_(0, token, y)
        return total.to(x.dtype)

    def _matrices(self, expert: int, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
        """The first and the second product of an expert, as functions of their inputs."""
        names = self.first_name, "down_proj"
        specs = self.gate_up, self.down
        for name, held, spec, table, (rows, cols) in zip(
            names, self.packed, specs, self._tables, self.shapes, strict=True
        ):
            start, number = table[expert].tolist()
            codec = spec.codec(expert)
            packed = held[start : start + codec.nbytes(rows, cols)]
            bias = self._parameters[f"{name}_bias"]
            own_bias = None if bias is None else bias[expert].to(dtype)
            yield _product(packed, own_bias, rows, number, spec, self.activation_bits)

    def extra_repr(self) -> str:
        own = "" if self.own is None else ", expert by expert, by the model's own functions"
        return f"{super().extra_repr()}, scales_input={self.scales_input}{own}"


def _refuse_gradient(y: Any) -> None:
    y.register_hook(lambda _: refuse("trained"))


def _product(
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    number: int,
    spec: PackedSpec,
    activation_bits: int,
) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        y: Tensor = kernels.linear(
            x, packed, bias, rows, number, spec.group_size, activation_bits, spec.family
        )
        return y

    return product
