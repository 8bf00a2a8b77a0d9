"""Calls of the experts op with every gate that families use, and an oracle for them."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from moepress.format.codec import Codec, PackedSpec
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gate import Gate
from moepress.kernels.reference import ACTIVATIONS, dequantize
from tests.kernels import test_kernels
from tests.rounding import test_trellis

GATES = {
    "plain": Gate("silu"),
    "gpt_oss": Gate("silu", limit=7.0, alpha=1.702, up_offset=1.0),
    "deepseek_v4": Gate("silu", limit=3.0),
    "nemotron_h": Gate("relu2", gated=False),
    "step3p7": Gate("silu", limit=2.0, limits_output=True),
    "inkling2": Gate("silu", gate_softcap=4.0, up_softcap=2.5),
    "limited gelu": Gate("gelu_pytorch_tanh", limit=1.5, up_offset=-0.5),
    "no gate, limited": Gate("silu", gated=False, limit=2.0, alpha=1.5, limits_output=True),
    "everything": Gate("silu", True, 2.5, 1.3, 0.25, True, 1.75, 2.0),
}

WIDTHS = {"int": ((1, 2, 3, 4, 8), (3, 8, 1, 2, 2)), "trellis": ((1, 2, 4, 3), (3, 2, 1, 4))}


def gated_call(
    gate: Gate,
    family: str = "int",
    *,
    biases: tuple[bool, bool] = (False, False),
    tokens: int = 7,
    hidden: int = 64,
    inner: int = 96,
    group: int = 32,
    activation_bits: int = 8,
    dtype: torch.dtype = torch.float32,
    size: float = 6.0,
) -> ExpertsCall:
    """A call whose first products are near `size` in magnitude, so that limits take effect.

    Index -1, and the first number that is no expert, are among the choices.
    """
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = (PackedSpec(widths, group, family) for widths in WIDTHS[family])
    shapes = (gate.parts * inner, hidden), (hidden, inner)
    random_packed = {"int": test_kernels.random_packed, "trellis": test_trellis.random_packed}
    packed = [
        torch.cat([random_packed[family](*s, c, seed) for seed, c in enumerate(spec.codecs)])
        for spec, s in zip((gate_up, down), shapes, strict=True)
    ]
    count = len(gate_up.bits)
    x = torch.randn(tokens, hidden, generator=generator)
    unit = math.sqrt(hidden) * (0.1 if family == "int" else 1.0)
    bias = [
        torch.randn(count, shape[0], generator=generator).to(dtype) if wanted else None
        for shape, wanted in zip(shapes, biases, strict=True)
    ]
    return ExpertsCall(
        (x * (size / unit)).to(dtype),
        torch.randint(-1, count + 1, (tokens, 3), generator=generator),
        torch.rand(tokens, 3, generator=generator),
        *packed,
        *(torch.tensor(spec.table(*s)) for spec, s in zip((gate_up, down), shapes, strict=True)),
        inner,
        group,
        group,
        gate.activation,
        activation_bits,
        family,
        *bias,
        *(getattr(gate, f.name) for f in fields(gate)[1:]),
    )


def gate_oracle(gate: Gate, x: Tensor) -> Tensor:
    """h of one row [R] of first products, number by number in float64."""
    inner = len(x) // gate.parts
    return torch.tensor(
        [
            _h(gate, g, x[inner + i].item() if gate.gated else None)
            for i, g in enumerate(x[:inner].tolist())
        ],
        dtype=torch.float64,
    )


def _h(gate: Gate, g: float, u: float | None) -> float:
    def cap(x: float, c: float) -> float:
        return c * math.tanh(x / c) if math.isfinite(c) else x

    g = g if gate.limits_output else min(g, gate.limit)
    if gate.activation == "silu":
        a = cap(g, gate.gate_softcap) / (1 + math.exp(-gate.alpha * g))
    else:
        a = ACTIVATIONS[gate.activation](torch.tensor(g, dtype=torch.float64)).item()
    a = min(a, gate.limit) if gate.limits_output else a
    if u is None:
        return a
    return a * (cap(min(max(u, -gate.limit), gate.limit), gate.up_softcap) + gate.up_offset)


def experts_oracle(call: ExpertsCall) -> Tensor:
    """The result in float64, [T, H]: one token and one of its choices at a time."""
    width, inner, count = call.hidden.shape[1], call.intermediate_size, len(call.gate_up_table)
    out = torch.zeros(call.hidden.shape, dtype=torch.float64)

    def matrix(packed: Tensor, entry: Tensor, group: int, rows: int, cols: int) -> Tensor:
        first, codec = int(entry[0]), Codec(int(entry[1]), group, call.family)
        return dequantize(packed[first:][: codec.nbytes(rows, cols)], rows, cols, codec).double()

    for t, experts in enumerate(call.top_k_index.tolist()):
        for e, weight in zip(experts, call.top_k_weights[t].tolist(), strict=True):
            if not 0 <= e < count:
                continue
            first = matrix(
                call.gate_up, call.gate_up_table[e], call.gate_up_group, call.rows, width
            )
            second = matrix(call.down, call.down_table[e], call.down_group, width, inner)
            x = first @ call.hidden[t].double()
            x = x if call.gate_up_bias is None else x + call.gate_up_bias[e].double()
            y = second @ gate_oracle(call.gate, x)
            y = y if call.down_bias is None else y + call.down_bias[e].double()
            out[t] += weight * y
    return out
