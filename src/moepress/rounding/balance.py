"""Equal experts whose `down` is easier to round: the sizes of their inner channels are balanced.

Where h = act(g) * u, rows of up divided by s_i and columns of `down` times s_i leave the expert as
it is, for any s > 0. Rows of up have scales of their own, so they are rounded as well as before. In
`down`, rounding leaves about the same error in all columns of a run: where channels were scaled
unevenly, small columns of strong inputs are lost. Training with decay of weights makes the rows of
up and the columns of `down` equally large. So they are made here, however the model was scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moepress.blocks.form import Form, apply_gate
from moepress.original.experts import Routed, RoutedExpert
from moepress.original.walk import Walk
from moepress.rounding.options import Rounding
from moepress.rounding.pre_quant_scale import with_scaled_columns


def experts_to_round(
    walk: Walk, layer: int, numbers: Sequence[int], routed: Routed, rounding: Rounding
) -> Iterator[RoutedExpert]:
    """`walk.experts` with weights for their scaled inputs (pre_quant_scale.py).

    They are balanced where `rounding` asks for it and their function allows it.
    """
    read = map(with_scaled_columns, walk.experts(layer, numbers, routed))
    form, module = walk.source.experts[layer].form, walk.experts_module(layer)
    if rounding.balance and can_balance(form, module, walk.source.device):
        return map(balanced, read)
    return read


def can_balance(form: Form, module: Any, device: torch.device) -> bool:
    """Whether channels of an experts module can be scaled in up and scaled back in `down`.

    Biases are stored as they are, so with some they cannot.
    """
    scalable = form.gated and not form.by_neuron and form.gate_up.bias is None
    return scalable and _up_multiplies(module, device)


def balanced(expert: RoutedExpert) -> RoutedExpert:
    """The expert with balanced channels, if it `can_balance`."""
    gate_up, down = expert.weights.gate_up, expert.weights.down
    inner = down.shape[1]
    scale = channel_scales(norms(gate_up[inner:], 1), norms(down, 0))
    scale = scale.bfloat16().float()  # norms summed in another order, on a card say, give the same
    up = (gate_up[inner:].float() / scale[:, None]).to(gate_up)
    weights = expert.weights._replace(
        gate_up=torch.cat([gate_up[:inner], up]), down=(down.float() * scale).to(down)
    )
    return expert.with_weights(weights)


def channel_scales(rows: Tensor, columns: Tensor) -> Tensor:
    """s [I], which divides rows of up and multiplies columns of `down`: their norms become equal.

    But for a common factor: the root mean square of the columns' norms stays.

    Args:
        rows: [I] norms of the rows of up.
        columns: [I] norms of the columns of `down`.
    """
    used = (rows > 0) & (columns > 0)
    if not used.any():
        return torch.ones_like(columns)
    scale = torch.where(used, (rows / columns).sqrt(), 1.0)
    factor = columns[used].norm() / (scale * columns)[used].norm()
    return torch.where(used, scale * factor, 1.0)


def norms(x: Tensor, dim: int) -> Tensor:
    """Float64: in float32 they would differ with the number of threads."""
    found: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return found


def _up_multiplies(module: Any, device: torch.device) -> bool:
    """Whether the inputs of `down` are the outputs of up times something: without limits, say.

    Products with 2 are exact, so the function is asked, at numbers that limits would show at.
    """
    near = torch.linspace(-8, 8, 33, device=device)
    values = torch.cat([near, 1000 * near])
    products = torch.cartesian_prod(values, values)
    twice = products * torch.tensor([1.0, 2.0], device=device)
    return torch.equal(apply_gate(module, twice), 2 * apply_gate(module, products))
