"""Whether a model can be walked and read: one check for `inspect`, dry runs and compression.

It takes a fraction of a second, and no weight is read.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from moepress.errors import CheckpointError, InputError, MoepressError
from moepress.original.calls import Call, record_layer_calls
from moepress.original.carried import returned_values
from moepress.original.composite import decoder
from moepress.original.quantized.forms import Plain
from moepress.original.source import Source

TOKENS = 8  # of the sequence for which the model calls its layers


class _Dequantized(Exception):  # noqa: N818  # no error: its shape is only known when it is read
    """A tensor is quantized."""


def check_usable(source: Source) -> None:
    """Check what would otherwise fail only in the middle of a compression.

    Raises:
        InputError: the model cannot be walked layer by layer.
        CheckpointError: a tensor cannot be converted, or has another shape than the model's.
    """
    for layer in source.layers:
        returned_values(layer)
    calls_without_weights(source, TOKENS)
    for name in source.all_names:
        _check_conversion(source, name)


def calls_without_weights(source: Source, tokens: int) -> list[Call]:
    """The calls of all layers for one sequence; weights are zeros, and no layer is run.

    Raises:
        InputError: the model cannot be walked layer by layer.
    """
    shared = {id(layer): layer for layer in source.layers}
    model = copy.deepcopy(decoder(source.model), shared)  # its code may change its buffers
    inside = {id(module) for layer in source.layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            _fill_with_zeros(module)
    try:
        with torch.no_grad():
            ids = torch.zeros((1, tokens), dtype=torch.int64)
            return record_layer_calls(model, source.layers, ids)
    except MoepressError:
        raise
    except Exception as error:  # the model's own code, which may raise anything
        raise InputError(
            f"{type(source.model).__name__} cannot be walked layer by layer: outside its layers "
            f"its code fails with {type(error).__name__}: {error}"
        ) from error


def _fill_with_zeros(module: nn.Module) -> None:
    """Replace meta tensors of a module by zeros. Memory that is not read is not taken."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _check_conversion(source: Source, name: str) -> None:
    """Convert a tensor on the meta device, and compare its shape with the model's."""
    forms = source.checkpoint.forms

    def read(key: str, expert: int | None) -> Tensor:
        form = forms[key]
        if not isinstance(form, Plain):
            raise _Dequantized
        return torch.empty(form.entry.shape, device="meta")

    try:
        made = source.converted_shape(name, read)
    except _Dequantized:
        return
    except MoepressError:
        raise
    except Exception as error:  # transformers' conversions raise many types
        raise CheckpointError(
            f"{name} cannot be made of the tensors of {source.folder}: {error}. They do not fit "
            "the config: fetch the model again."
        ) from error
    if made != source.shape(name):
        raise CheckpointError(
            f"{name} of {source.folder} has shape {list(made)}. Its config says "
            f"{list(source.shape(name))}: fetch the model again."
        )
