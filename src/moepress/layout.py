"""What a compressed folder will hold, known before a single weight is read.

Which linears are packed and how, how many bytes everything but the routed experts takes, and
whether the group size fits: the allocator's budget and the checkpoint's size both come from here.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from moepress.architectures import linear_role
from moepress.codec import Codec, PackedSpec, fitting_group_size
from moepress.drop_costs import drop_bytes
from moepress.errors import InputError
from moepress.recipe import UNQUANTIZED, Recipe
from moepress.source import Source

logger = logging.getLogger(__name__)


def codec_for(bits: int, cols: int, group_size: int, family: str = "int") -> Codec:
    """The codec of `bits` for rows of `cols` weights: the asked group size or a smaller one.

    Raises:
        InputError: no group size offered divides the row.
    """
    group = fitting_group_size(cols, group_size)
    if group is None:
        raise InputError(
            f"No group size up to {group_size} divides a row of {cols} weights. Expected rows of "
            "a multiple of 32 weights: this model's experts cannot be packed."
        )
    return Codec(bits, group, family)


def check_group_sizes(source: Source, recipe: Recipe) -> None:
    """Raise InputError if the experts' rows cannot be cut into groups; warn of smaller groups."""
    one = next(iter(source.experts.values()))
    for name, (_, cols) in (("gate_up_proj", one.gate_up_shape), ("down_proj", one.down_shape)):
        group = codec_for(recipe.expert_bits[0], cols, recipe.group_size).group_size
        if group != recipe.group_size:
            logger.warning(
                "group size %d does not divide the %d inputs of %s; %d is used there",
                recipe.group_size, cols, name, group,
            )  # fmt: skip


def linear_specs(source: Source, recipe: Recipe) -> dict[str, PackedSpec]:
    """Packed tensors that are not routed experts, by parameter name, as the recipe asks."""
    specs: dict[str, PackedSpec] = {}
    left = []
    for index, layer in enumerate(source.layers):
        for path, module in layer.named_modules():
            role = linear_role(path, index in source.experts)
            if type(module) is not nn.Linear or role is None:
                continue
            bits = getattr(recipe, f"{role}_bits")
            group = fitting_group_size(module.in_features, recipe.group_size)
            if bits == UNQUANTIZED:
                continue
            if group is None:
                left.append(path)
                continue
            specs[f"{source.layer_path(index)}.{path}.weight"] = PackedSpec((bits,), group)
    if left:
        logger.warning(
            "%d linears stay unquantized, as no group size divides their rows: %s",
            len(left), ", ".join(sorted(set(left))),
        )  # fmt: skip
    return specs | _ends(source, recipe)


def _ends(source: Source, recipe: Recipe) -> dict[str, PackedSpec]:
    """The embedding and the head, where the recipe asks for them."""
    wanted = {"embedding": recipe.embedding_bits, "head": recipe.head_bits}
    if all(bits == UNQUANTIZED for bits in wanted.values()):
        return {}
    model = source.model
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    if modules["head"].weight is modules["embedding"].weight:  # one tensor, stored once
        if recipe.head_bits != recipe.embedding_bits:
            raise InputError(
                f"{source.name} ties its head to its embedding: they are one tensor. Set head_bits "
                f"({recipe.head_bits}) and embedding_bits ({recipe.embedding_bits}) alike."
            )
        del wanted["head"]
    paths = {id(module): path for path, module in model.named_modules()}
    specs = {}
    for name, bits in wanted.items():
        module = modules[name]
        if bits == UNQUANTIZED:
            continue
        if type(module) not in (nn.Linear, nn.Embedding):
            raise InputError(
                f"The {name} of {type(model).__name__} is a {type(module).__name__}, expected a "
                f"plain linear or embedding. Leave {name}_bits at {UNQUANTIZED}."
            )
        codec = codec_for(bits, module.weight.shape[1], recipe.group_size)
        specs[f"{paths[id(module)]}.weight"] = PackedSpec((bits,), codec.group_size)
    return specs


def every_name(source: Source) -> list[str]:
    """All tensors of the model but the routed experts."""
    layers = [source.layer_path(i) for i in range(len(source.layers))]
    return [name for prefix in (None, *layers) for name in source.names(prefix)]


def fixed_bytes(source: Source, specs: dict[str, PackedSpec]) -> int:
    """Stored bytes of all tensors but the routed experts."""
    total = 0
    for name in every_name(source):
        shape = source.shape(name)
        if name in specs:
            total += specs[name].nbytes(*shape)
        else:
            total += shape.numel() * source.stored_dtype(name).itemsize
    return total


def file_bytes(source: Source, recipe: Recipe) -> int:
    """About how many bytes the folder holds besides tensors: tokenizer, JSON, headers, scores.

    Nothing beside the weights of a large model; a good part of a toy's folder. Constants are what
    our files take per entry, names apart (docs/format.md shows them).
    """
    names = every_name(source)
    expert_names = [
        f"{e.path}.{n}" for e in source.experts.values() for n in ("gate_up_proj", "down_proj")
    ]
    packed = [*linear_specs(source, recipe), *expert_names]
    moe_layers, experts = len(source.experts), next(iter(source.experts.values())).experts
    headers = sum(len(name) + 68 for name in (*names, *expert_names)) + 32 * len(source.layers)
    index = sum(len(name) + 43 for name in (*names, *expert_names)) + 100
    entries = sum(len(name) + 75 for name in packed) + 2 * moe_layers * experts + 500
    plan = 1500 + moe_layers * (2 * experts + 75)
    if recipe.expert_codec != "int":
        entries += 30 * len(expert_names)  # "family"
    scores = 1400 + moe_layers * (16 + experts * (16 + 24 * len(recipe.expert_bits)))
    drops = 900 + moe_layers * (drop_bytes(chosen_experts(source.config)) + 5)
    copied = [*source.companions(), source.folder / "config.json"]
    return headers + index + entries + plan + scores + drops + sum(p.stat().st_size for p in copied)


def chosen_experts(config: Any) -> int:
    """k, as the config of most families has it; where another name is used, the usual 8."""
    return int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 8)
