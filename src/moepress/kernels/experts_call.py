"""The arguments of the op `moepress::experts` as one value, and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.kernels.checks import check_bytes, check_floats, check_one_device
from moepress.kernels.gate import Gate


@dataclass(frozen=True, eq=False, slots=True)
class ExpertsCall:
    """One call of the routed experts of a layer. Fields are in the argument order of the op.

    Sizes: T tokens, k choices per token, E experts, H hidden size, I intermediate size.

    Attributes:
        hidden: [T, H], a float dtype. All matrix products are in this dtype.
        top_k_index: [T, k] int64, the experts that each token chose. An index outside 0 .. E-1
            contributes nothing.
        top_k_weights: [T, k], any float dtype, the routing weights. Sums over k are in float32.
        gate_up: [bytes] uint8, the packed [R, H] matrices of all experts. R = 2I, gate rows first;
            without a gate R = I.
        down: [bytes] uint8, the packed [H, I] matrices of all experts.
        gate_up_table, down_table: [E, 2] int64, (first byte, number of the width) of each expert's
            matrix; the number as `width_number` of format/codec.py.
            An expert with 0 bits in both tables is left out: choosing it contributes nothing.
        intermediate_size: I.
        gate_up_group, down_group: group sizes, in columns.
        activation: the activation function of the gate, a name in `reference.ACTIVATIONS`.
        activation_bits: precision of the activations in both products, as in `ops.linear`.
        family: codec family of all matrices.
        gate_up_bias: [E, R], any float dtype, or None.
        down_bias: [E, H], any float dtype, or None. The routing weights scale it too.
        gated, limit, alpha, up_offset, limits_output, gate_softcap, up_softcap: as in `Gate`.
        store, store_layer: number of an expert store (stores.py) whose region both packed tensors
            are, and of the layer in it; 0: the packed tensors are whole in memory.
    """

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_table: Tensor
    down_table: Tensor
    intermediate_size: int
    gate_up_group: int
    down_group: int
    activation: str
    activation_bits: int = 8
    family: str = "int"
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True
    limit: float = math.inf
    alpha: float = 1.0
    up_offset: float = 0.0
    limits_output: bool = False
    gate_softcap: float = math.inf
    up_softcap: float = math.inf
    store: int = 0
    store_layer: int = 0

    @property
    def gate(self) -> Gate:
        """What lies between the two products.

        Raises:
            InputError: as `Gate`.
        """
        return _gate(
            self.activation,
            self.gated,
            self.limit,
            self.alpha,
            self.up_offset,
            self.limits_output,
            self.gate_softcap,
            self.up_softcap,
        )

    @property
    def rows(self) -> int:
        """R: the rows of the first product of an expert."""
        return self.gate.parts * self.intermediate_size


def check_experts_call(call: ExpertsCall) -> None:
    """Check the tensors of a call: backends read them by address and must stay inside.

    Backends check the entries of the tables and the name of the activation function.

    Raises:
        InputError: a shape, dtype or device does not fit, or the gate is none (`Gate`).
    """
    _ = call.gate
    check_floats(call.hidden)
    _check_routing(call.hidden, call.top_k_index, call.top_k_weights)
    check_one_device(
        call.hidden,
        top_k_index=call.top_k_index,
        top_k_weights=call.top_k_weights,
        gate_up=call.gate_up,
        down=call.down,
        gate_up_table=call.gate_up_table,
        down_table=call.down_table,
        gate_up_bias=call.gate_up_bias,
        down_bias=call.down_bias,
    )
    _check_matrices("gate_up", call.gate_up, call.gate_up_table)
    _check_matrices("down", call.down, call.down_table)
    experts = len(call.gate_up_table)
    _check_bias("gate_up", call.gate_up_bias, (experts, call.rows))
    _check_bias("down", call.down_bias, (experts, call.hidden.shape[1]))


def _check_routing(hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    fits = hidden.dim() == index.dim() == 2 and len(hidden) == len(index)
    if not fits or index.shape != weights.shape or index.is_floating_point():
        raise InputError(
            "Expected hidden [T, H], top_k_index [T, k] of integers and top_k_weights [T, k]; got "
            f"{list(hidden.shape)}, {list(index.shape)} {index.dtype} and {list(weights.shape)}."
        )


def _check_matrices(name: str, packed: Tensor, table: Tensor) -> None:
    check_bytes(name, packed, packed.numel())  # any length: the backend compares it with the table
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 2:
        raise InputError(
            f"{name}_table must be [E, 2] int64, got {list(table.shape)} {table.dtype}."
        )


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, int]) -> None:
    if bias is not None and (bias.shape != shape or not bias.is_floating_point()):
        raise InputError(
            f"{name}_bias must be {list(shape)} of floats, one row for each expert; got "
            f"{list(bias.shape)} {bias.dtype}."
        )


_gate = lru_cache(maxsize=64)(Gate)  # a decode step asks once for each layer
