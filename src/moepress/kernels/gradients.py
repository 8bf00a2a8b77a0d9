"""Gradients of the ops, so that adapters on a packed model can be trained (LoRA).

Inputs, routing weights and biases get gradients; packed weights get none. The gradient is that of
the op with activations as they are: where a kernel rounds them, it is taken straight through.

The backward pass unpacks some rows of a matrix at a time, as the reference backend does. Of the
experts op it first computes `experts_by_slots`, which is made of operations that autograd knows, so
a forward call keeps nothing but its arguments.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from moepress.format.codec import LEFT_OUT, Codec, width_of
from moepress.kernels import reference
from moepress.kernels.backends import backend_for
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.ops import drop, experts, linear
from moepress.kernels.stores import held

ARGUMENTS = tuple(field.name for field in fields(ExpertsCall))  # of the experts op, in its order
TRAINED = ("hidden", "top_k_weights", "gate_up_bias", "down_bias")  # those that get gradients
TENSORS = (*TRAINED, "top_k_index", "gate_up", "down", "gate_up_table", "down_table")
LIMITS = {f.name for f in fields(ExpertsCall) if f.default == math.inf}  # None in the op's schema


@torch.library.custom_op("moepress::linear_transposed", mutates_args=())
def linear_transposed(
    y: Tensor, packed: Tensor, in_features: int, bits: int, group_size: int, family: str
) -> Tensor:
    """y W: [..., N] to [..., K], in the dtype of y. The arguments are those of `ops.linear`."""
    codec = Codec(width_of(bits), group_size, family)
    return reference.linear_transposed(y, packed, in_features, codec)


@linear_transposed.register_fake
def _(y: Tensor, packed: Tensor, in_features: int, *_: object) -> Tensor:
    return y.new_empty((*y.shape[:-1], in_features))


@torch.library.custom_op("moepress::slot_products", mutates_args=())
def slot_products(
    x: Tensor,
    expert: Tensor,
    packed: Tensor,
    table: Tensor,
    shape: list[int],
    group_size: int,
    family: str,
    activation_bits: int,
    store: int,
    store_layer: int,
    transposed: bool,
) -> Tensor:
    """The product of each row of x with the matrix of its expert.

    Args:
        x: [S, K], a float dtype; [S, N] if transposed.
        expert: [S] int64. The result is 0 where it is outside 0 .. E-1, or left out.
        packed, table: as `gate_up` and `gate_up_table` of `ExpertsCall`.
        shape: N and K, of every matrix.
        group_size, family, activation_bits, store, store_layer: as of `ExpertsCall`.
        transposed: multiply by W instead of W^T.

    Returns:
        [S, N] in the dtype of x; [S, K] if transposed.
    """
    rows, cols = shape
    out = x.new_zeros((len(x), cols if transposed else rows))
    entries = table.tolist()
    for number, slots in reference.slots_by_expert(expert, len(entries)):
        start, bits = entries[number]
        if bits == LEFT_OUT:
            continue
        codec = Codec(width_of(bits), group_size, family)
        matrix = packed[start : start + codec.nbytes(rows, cols)]
        with held(store, store_layer, number):
            if transposed:
                out[slots] = reference.linear_transposed(x[slots], matrix, cols, codec)
            else:
                product = backend_for(x.device).linear
                out[slots] = product(x[slots], matrix, None, rows, codec, activation_bits)
    return out


@slot_products.register_fake
def _(
    x: Tensor, expert: Tensor, packed: Tensor, table: Tensor, shape: list[int], *rest: object
) -> Tensor:
    return x.new_empty((len(x), shape[1] if rest[-1] else shape[0]))


def experts_by_slots(call: ExpertsCall) -> Tensor:
    """The result of the experts op, by operations that autograd knows.

    A slot is one choice of a token. The first products of all slots are in memory, [T k, R].
    """
    tokens, k = call.top_k_index.shape
    expert = call.top_k_index.flatten()
    x = call.hidden[:, None].expand(tokens, k, -1).flatten(0, 1)
    hidden, rows = call.hidden.shape[1], call.rows
    there = (expert >= 0) & (expert < len(call.gate_up_table))
    chosen = expert.where(there, 0)
    there &= call.gate_up_table[chosen, 1] != LEFT_OUT

    def product(x: Tensor, first: bool) -> Tensor:
        matrices = (
            (call.gate_up, call.gate_up_table, [rows, hidden], call.gate_up_group)
            if first
            else (call.down, call.down_table, [hidden, call.intermediate_size], call.down_group)
        )
        how = call.family, call.activation_bits, call.store, call.store_layer
        y: Tensor = slot_products(x, expert, *matrices, *how, False)
        bias = call.gate_up_bias if first else call.down_bias
        return y if bias is None else y + bias[chosen].to(y.dtype)

    y = product(reference.gated(call.gate, product(x, first=True)), first=False)
    wide = torch.promote_types(y.dtype, torch.float32)
    weights = call.top_k_weights.flatten().to(wide) * there
    return (y.to(wide) * weights[:, None]).view(tokens, k, hidden).sum(1).to(call.hidden.dtype)


# What torch calls


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, _, bits, group_size, _, family = inputs
    ctx.save_for_backward(packed)
    ctx.codec = x.shape[-1], bits, group_size, family
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    x = bias = None
    if ctx.needs_input_grad[0]:
        x = linear_transposed(y, packed, *ctx.codec)
    if ctx.needs_input_grad[2]:
        bias = y.sum_to_size(y.shape[-1]).to(ctx.bias_dtype)
    return x, None, bias, None, None, None, None, None


def _slots_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, expert, packed, table, *others, transposed = inputs
    ctx.save_for_backward(expert, packed, table)
    ctx.others, ctx.transposed = others, transposed


def _slots_backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    x = slot_products(y, *ctx.saved_tensors, *ctx.others, not ctx.transposed)
    return x, *[None] * (len(ctx.others) + 4)


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.save_for_backward(*(given.pop(name) for name in TENSORS))
    ctx.others = {
        name: math.inf if value is None and name in LIMITS else value
        for name, value in given.items()
    }


def _experts_backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.others | dict(zip(TENSORS, ctx.saved_tensors, strict=True))
    needed = dict(zip(ARGUMENTS, ctx.needs_input_grad, strict=False))  # without defaults
    wanted = [name for name in TRAINED if needed.get(name)]
    with torch.enable_grad():
        leaves = {name: given[name].detach().requires_grad_() for name in wanted}
        result = experts_by_slots(ExpertsCall(**(given | leaves)))
        found = torch.autograd.grad(result, tuple(leaves.values()), y)
    by_name = dict(zip(wanted, found, strict=True))
    return tuple(by_name.get(name) for name in ARGUMENTS)


def _drop_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    index, weights, thresholds, renormalise, keep, num_experts = inputs
    ctx.save_for_backward(index, weights, thresholds, keep)
    ctx.others = renormalise, num_experts


def _drop_backward(ctx: Any, _: Any, kept: Tensor, __: Any) -> tuple[Tensor | None, ...]:
    index, weights, thresholds, keep = ctx.saved_tensors
    renormalise, num_experts = ctx.others
    with torch.enable_grad():
        leaf = weights.detach().requires_grad_()
        _, again, _ = reference.drop(index, leaf, thresholds, renormalise, keep, num_experts)
        (found,) = torch.autograd.grad(again, leaf, kept)
    return None, found, None, None, None, None


def register_gradients() -> None:
    """Tell torch the gradients of the ops."""
    linear.op.register_autograd(_linear_backward, setup_context=_linear_setup)
    slot_products.register_autograd(_slots_backward, setup_context=_slots_setup)
    drop.op.register_autograd(_drop_backward, setup_context=_drop_setup)
    experts.op.register_autograd(_experts_backward, setup_context=_experts_setup)
