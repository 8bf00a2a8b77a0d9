"""Replace the modules of a model by packed ones, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moepress.errors import InputError
from moepress.format.codec import PackedSpec
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear
from moepress.kernels.reference import ACTIVATIONS
from moepress.original.architectures import check_supported, is_experts

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


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
        model.set_submodule(path, packed)


def activation_name(function: Any) -> str:
    """The name of an activation, recognised by the values it computes.

    Raises:
        InputError: it computes the same as none of `kernels.reference.ACTIVATIONS`.
    """
    near = torch.linspace(-8, 8, 129, dtype=torch.float32, device="cpu")
    probe = torch.cat([near, 1000 * near])  # only large values reveal clipped activations
    if not (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
        value = function(probe)
        for name, known in ACTIVATIONS.items():
            if torch.allclose(value, known(probe), rtol=1e-5, atol=1e-6):
                return name
    raise InputError(
        f"Its activation is {function}. Expected one that computes the same as one of "
        f"{sorted(ACTIVATIONS)}."
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
    check_supported(module, path)
    if specs.keys() != set(EXPERT_PARAMETERS):
        raise InputError(
            f"Of these experts, {sorted(specs)} is packed. Expected both of "
            f"{list(EXPERT_PARAMETERS)}."
        )
    experts, rows, hidden = module.gate_up_proj.shape
    gate_up, down = (specs[name] for name in EXPERT_PARAMETERS)
    if gate_up.family != down.family:
        raise InputError(
            f"Their codecs are of families '{gate_up.family}' and '{down.family}'. Expected one."
        )
    name = activation_name(module.act_fn)
    return PackedExperts(experts, hidden, rows // 2, gate_up, down, Gate(name))
