"""Gates and biases as arguments of the kernels."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from moepress.kernels import reference
from moepress.kernels.cuda.launch import DTYPES
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gate import Gate

ACTIVATIONS = tuple(reference.ACTIVATIONS)  # in the order of activation.cuh


def plain_activation(call: ExpertsCall) -> int | None:
    """The number of the activation if h = act(g) * u without biases of g and u, else None.

    Such calls have kernels of their own.
    """
    plain = call.gate_up_bias is None and call.gated and call.gate.plain
    return ACTIVATIONS.index(call.activation) if plain else None


def gate_arguments(call: ExpertsCall, pair: Tensor) -> tuple[Tensor | int | float | None, ...]:
    """The last arguments of the kernels named _any: biases, routing, gate (gate.cuh)."""
    return *bias_arguments(call.gate_up_bias), pair, call.top_k_index, *_fields(call.gate)


def bias_arguments(bias: Tensor | None) -> tuple[Tensor | None, int]:
    """A bias and its dtype."""
    return bias, 0 if bias is None else DTYPES[bias.dtype]


@lru_cache(maxsize=64)
def _fields(gate: Gate) -> tuple[int | float, ...]:
    return (
        ACTIVATIONS.index(gate.activation),
        int(gate.gated),
        int(gate.limits_output),
        float(gate.limit),
        float(gate.alpha),
        float(gate.up_offset),
        float(gate.gate_softcap),
        float(gate.up_softcap),
    )
