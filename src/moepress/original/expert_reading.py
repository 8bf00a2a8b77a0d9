"""Read the weights of one routed expert, in the form that moepress computes with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moepress.blocks.layout import Part, padded_bias, padded_matrix
from moepress.errors import FileError
from moepress.original.architectures import Experts
from moepress.original.experts import ExpertWeights

# What a parameter has of an expert: (its name, number of the expert, entries of its first
# dimension that belong to one expert).
ReadRows = Callable[[str, int, int], Tensor]


def read_expert(experts: Experts, index: int, read: ReadRows) -> ExpertWeights:
    """The weights of expert `index`: canonical (blocks/layout.py) and padded.

    Raises:
        FileError: their shapes are not those of the config.
    """
    form = experts.form
    gate_up, down = (_matrix(part, index, read) for part in (form.gate_up, form.down))
    shapes = form.shapes
    if (tuple(gate_up.shape), tuple(down.shape)) != shapes:
        raise FileError(
            f"Expert {index} of {experts.path} has weights of {tuple(gate_up.shape)} and "
            f"{tuple(down.shape)} in its files; the config says {shapes[0]} and {shapes[1]}. Fetch "
            "the model again."
        )
    (rows, cols), down_shape = form.packed_shapes
    return ExpertWeights(
        padded_matrix(gate_up, form.parts, rows // form.parts, cols),
        padded_matrix(down, 1, *down_shape),
        _bias(experts, form.gate_up, index, read),
        _bias(experts, form.down, index, read),
    )


def as_packed(experts: Experts | None, name: str, value: Tensor) -> Tensor:
    """A layer's tensor that is not packed, as the packed modules expect it.

    Biases [E, N] of the routed experts get the order of the packed rows, and their padding.
    """
    bias = None if experts is None else experts.biases.get(name)
    if bias is None:
        return value
    return padded_bias(bias.part.in_order(value, 1), bias.parts, bias.rows).contiguous()


def _matrix(part: Part, index: int, read: ReadRows) -> Tensor:
    """A matrix [N, K] of an expert, without padding."""
    return part.matrix([read(name, index, part.rows) for name in part.names])


def _bias(experts: Experts, part: Part, index: int, read: ReadRows) -> Tensor | None:
    """The bias of a matrix of an expert; None if it has none."""
    if part.bias is None:
        return None
    return as_packed(experts, part.bias, read(part.bias, index, 1))[0]
