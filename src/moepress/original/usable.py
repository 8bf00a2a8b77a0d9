"""Whether a model can be walked and read: one check for `inspect`, dry runs and all work.

It takes seconds. Of the weights only those are read that are outside the layers or small; linears
and experts are checked as they are read.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from moepress.errors import InputError, MoepressError
from moepress.original.calls import Call, record_layer_calls
from moepress.original.carried import returned_values
from moepress.original.companions import left_behind
from moepress.original.composite import decoder
from moepress.original.remote_code import missing_code, one_line
from moepress.original.source import Source
from moepress.original.unneeded import some_of
from moepress.reading.config import CONFIG

logger = logging.getLogger(__name__)

TOKENS = 8  # of the sequence for which the model calls its layers


def check_usable(source: Source) -> None:
    """Check what would otherwise fail only in the middle of a compression, and tell what is odd.

    Raises:
        InputError: the model cannot be walked layer by layer, or chooses no expert; or tensors are
            made on another device than the CPU unless one is named.
        NumericalError: a weight outside the layers, or a small one inside, is not finite.
    """
    _check_default_device()
    for layer in source.layers:
        returned_values(layer)
    _check_choices(source)
    calls_without_weights(source, TOKENS)
    large = {name for linears in source.packable for name in linears}
    small = [name for name in source.all_names if name not in large]
    source.upcoming.tensors(small, "the tensors outside the layers, norms and routers")
    for name in small:
        source.tensor(name)
    _tell_left_out(source)


def _check_default_device() -> None:
    """Raise InputError if tensors are made elsewhere than on the CPU unless a device is named."""
    default = torch.get_default_device()
    if default.type != "cpu":
        raise InputError(
            f"torch's default device is {default}. moepress keeps what is small on the CPU, so it "
            "expects cpu there: call torch.set_default_device('cpu'), and name the device in the "
            f"call (device='{default.type}')."
        )


def _check_choices(source: Source) -> None:
    """Raise InputError if routers choose no expert, or more than there are."""
    more = int(getattr(source.text_config, "zero_expert_num", None) or 0)  # that compute nothing
    for index, experts in source.experts.items():
        for module in source.layers[index].modules():
            for name in ("top_k", "num_experts_per_tok"):
                chosen, there = getattr(module, name, 1), experts.form.choices
                if isinstance(chosen, int) and not 1 <= chosen <= there + more:
                    raise InputError(
                        f"{source.folder / CONFIG} has each token choose {chosen} of "
                        f"{there} experts. Expected at least 1, and no more than there "
                        "are: fetch the config again."
                    )


def _tell_left_out(source: Source) -> None:
    """Warn of tensors and files of the folder that a compressed model does not get."""
    if source.unused:
        logger.warning(
            "%s has %d tensors that %s of transformers does not use: %s. They are left out: the "
            "compressed model computes what transformers computes.",
            source.name, len(source.unused), type(source.model).__name__, some_of(source.unused),
        )  # fmt: skip
    files = left_behind(source.folder, set(source.files))
    if files:
        logger.warning(
            "%s has files that are no part of the model: %s. They are not copied.",
            source.name, some_of(files),
        )  # fmt: skip
    code = missing_code(source.folder)
    if code:
        logger.warning(
            "The configs of %s name code that is not there: %s. The compressed folder does "
            "without it.",
            source.name, some_of(code),
        )  # fmt: skip


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
            f"its code fails with {one_line(error)}"
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
