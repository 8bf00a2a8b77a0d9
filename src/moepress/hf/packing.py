"""Replace the modules of a model by packed ones, before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from moepress.blocks import adapt
from moepress.blocks.form import apply_gate, finish, form_of, is_experts, is_normed
from moepress.blocks.gates import gate_of
from moepress.errors import InputError
from moepress.format.codec import PackedSpec
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear
from moepress.kernels.uncommon import OwnFunctions, UncommonExperts

logger = logging.getLogger(__name__)


def with_tied(model: Any, specs: Mapping[str, PackedSpec]) -> dict[str, PackedSpec]:
    """Add the parameters that are tied to a packed one, such as the head to the embedding.

    Raises:
        InputError: both parameters of a tied pair are given, with different specs.
    """
    tied = dict(specs)
    for pair in model.all_tied_weights_keys.items():
        given = [tied[path] for path in pair if path in tied]
        if len(set(given)) > 1:
            raise InputError(
                f"{' and '.join(pair)} are one tensor (tied), but config.json packs them "
                f"differently: {[spec.to_json() for spec in given]}. The file is damaged."
            )
        if given:
            tied.update(dict.fromkeys(pair, given[0]))
    return tied


def pack_modules(model: nn.Module, specs: Mapping[str, PackedSpec]) -> None:
    """Replace the modules that own the parameters of `specs` by packed ones, weights unset.

    Raises:
        InputError: no such parameter, or a module that cannot be packed.
    """
    adapt(model)
    by_module: dict[str, dict[str, PackedSpec]] = {}
    for path, spec in specs.items():
        module, _, name = path.rpartition(".")
        by_module.setdefault(module, {})[name] = spec
    modules = dict(model.named_modules())
    for path, named in by_module.items():
        if path not in modules:
            raise InputError(
                f"config.json packs {path}.{next(iter(named))}, but {type(model).__name__} has no "
                f"module {path}. The file is damaged or belongs to another model."
            )
        try:
            packed = _packed(modules[path], path, named)
        except InputError as error:
            raise InputError(f"Cannot load {path} packed. {error}") from error
        count = sum(parameter.numel() for parameter in modules[path].parameters())
        packed.unpacked_parameters = count  # for `num_parameters`
        model.set_submodule(path, packed)
        if isinstance(packed, PackedExperts):
            _remove_emptied(model, path)
    slow = [m for m in model.modules() if isinstance(m, UncommonExperts) and m.own is not None]
    if slow:
        logger.warning(
            "the experts of %s have a function that no kernel has: they run one by one, with the "
            "model's own code between two products of the kernels",
            type(model).__name__,
        )


def _packed(module: nn.Module, path: str, specs: Mapping[str, PackedSpec]) -> nn.Module:
    """The packed module that replaces `module`."""
    if is_experts(module):
        return _packed_experts(module, path, specs)
    if specs.keys() != {"weight"} or len(specs["weight"].bits) != 1:
        raise InputError(
            f"It is a {type(module).__name__} with packed {sorted(specs)}. Expected one packed "
            "weight, of one width."
        )
    if specs["weight"].pre_quant_scale:
        raise InputError("Its inputs are scaled by a stored vector. Expected it of experts only.")
    (codec,) = specs["weight"].codecs
    if type(module) is nn.Embedding and codec.family != "int":
        raise InputError(f"An embedding of {codec.name} cannot be read row by row. Expected int.")
    if type(module) is nn.Linear:  # a subclass may compute something else
        has_bias = module.bias is not None
        return PackedLinear(module.in_features, module.out_features, codec, has_bias)
    if type(module) is nn.Embedding:
        return PackedEmbedding(module.num_embeddings, module.embedding_dim, codec)
    raise InputError(
        f"It is a {type(module).__name__}. Supported: torch.nn.Linear and torch.nn.Embedding "
        "themselves, not subclasses, and transformers' fused experts."
    )


def _packed_experts(module: Any, path: str, specs: Mapping[str, PackedSpec]) -> PackedExperts:
    form = form_of(module, path)
    if specs.keys() != set(form.names):
        raise InputError(
            f"Of these experts, {sorted(specs)} is packed. Expected both of {list(form.names)}."
        )
    gate_up, down = (specs[name] for name in form.names)
    if down.pre_quant_scale:
        raise InputError("Inputs of down are scaled by a stored vector. Expected it of the first.")
    if gate_up.family != down.family:
        raise InputError(
            f"Their codecs are of families '{gate_up.family}' and '{down.family}'. Expected one."
        )
    (_, hidden), (_, inner) = form.packed_shapes
    gate = gate_of(module)
    own = _own_functions(module) if gate is None or is_normed(module) else None
    common = own is None and not form.scales_input and hidden == form.hidden
    arguments = (
        inner,
        gate_up,
        down,
        gate or Gate("silu", form.gated),
        form.gate_up.bias is not None,
        form.down.bias is not None,
    )
    if common:
        return PackedExperts(form.experts, hidden, *arguments)
    return UncommonExperts(
        form.experts,
        form.hidden,
        hidden,
        *arguments,
        scales_input=form.scales_input,
        own=own,
    )


def _own_functions(module: Any) -> OwnFunctions:
    """The gate and the norm of an experts module, which loses its weights."""
    for name in list(module._parameters):
        delattr(module, name)
    return OwnFunctions(
        partial(apply_gate, module), partial(finish, module), dict(module.named_children())
    )


def _remove_emptied(model: nn.Module, path: str) -> None:
    """Remove the modules of a block whose weights are in the packed experts at `path`."""
    block = model.get_submodule(path.rpartition(".")[0])
    for name in getattr(block, "packed_away", ()):
        if hasattr(block, name):
            delattr(block, name)
