"""What a compressed folder will hold, known before a single weight is read.

Which linears are packed and how, how many bytes everything but the routed experts takes, and
whether the group size fits: the allocator's budget and the checkpoint's size both come from here.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import nn

from moepress.costs.drop_costs import drop_bytes
from moepress.errors import InputError
from moepress.format.codec import CODE_BITS, GROUP_SIZES, Codec, PackedSpec, fitting_group_size
from moepress.original.architectures import linear_role
from moepress.original.source import Source
from moepress.recipe import END_BITS, UNQUANTIZED, USUAL_LINEAR_BITS, Recipe

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
    """Raise InputError if the experts' rows cannot be cut into groups; warn of what differs."""
    one = next(iter(source.experts.values()))
    for name, (_, cols) in (("gate_up_proj", one.gate_up_shape), ("down_proj", one.down_shape)):
        group = codec_for(recipe.widths[0], cols, recipe.group_size).group_size
        if group != recipe.group_size:
            logger.warning(
                "group size %d does not divide the %d inputs of %s; %d is used there",
                recipe.group_size, cols, name, group,
            )  # fmt: skip
    left = {
        path
        for layer, module in enumerate(source.layers)
        for path, linear in module.named_modules()
        if type(linear) is nn.Linear
        and linear_role(path, layer in source.experts) is not None
        and fitting_group_size(linear.in_features, recipe.group_size) is None
    }
    if left:
        logger.warning(
            "linears whose rows no group size divides stay unquantized: %s", ", ".join(sorted(left))
        )


def packable(source: Source, layer: int) -> dict[str, nn.Linear]:
    """The linears of a decoder layer that can be packed, by parameter name."""
    prefix = source.layer_path(layer)
    return {
        f"{prefix}.{path}.weight": module
        for path, module in source.layers[layer].named_modules()
        if type(module) is nn.Linear
        and linear_role(path, layer in source.experts) is not None
        and fitting_group_size(module.in_features, GROUP_SIZES[0]) is not None
    }


def fixed_bits(source: Source, layer: int, name: str, recipe: Recipe) -> int | None:
    """The width that the recipe gives a packable linear; None: it is chosen with the experts'."""
    path = name.removeprefix(source.layer_path(layer) + ".").removesuffix(".weight")
    bits: int | None = getattr(recipe, f"{linear_role(path, layer in source.experts)}_bits")
    if bits is None and recipe.sensitivity == "none":
        return USUAL_LINEAR_BITS
    return bits


def linear_codec(bits: int, cols: int, recipe: Recipe) -> Codec:
    """The codec of a linear at a width: the recipe's family, or scalar where that has no such."""
    family = recipe.linear_codec if bits in CODE_BITS[recipe.linear_codec] else "int"
    return codec_for(bits, cols, recipe.group_size, family)


def fixed_end_bits(source: Source, roles: Sequence[str], recipe: Recipe) -> int | None:
    """The width that the recipe gives to an end; None: it is chosen with the experts'.

    Raises:
        InputError: a tied one is given two widths.
    """
    widths = {getattr(recipe, f"{role}_bits") for role in roles}
    if len(widths) > 1:
        raise InputError(
            f"{source.name} ties its head to its embedding: they are one tensor. Set head_bits "
            f"({recipe.head_bits}) and embedding_bits ({recipe.embedding_bits}) alike."
        )
    (bits,) = widths
    return UNQUANTIZED if bits is None and recipe.sensitivity == "none" else bits


def asked_widths(source: Source, recipe: Recipe) -> dict[str, int | None]:
    """The width that the recipe gives to every tensor but the experts that can be packed, by name.

    None: it is chosen with the experts'.

    Raises:
        InputError: an end is to be packed that cannot be.
    """
    widths = {
        name: fixed_bits(source, layer, name, recipe)
        for layer in range(len(source.layers))
        for name in packable(source, layer)
    }
    for name, roles in source.ends.items():
        bits = fixed_end_bits(source, roles, recipe)
        if _is_plain(source, name):
            widths[name] = bits
        elif bits not in (None, UNQUANTIZED):
            module = source.model.get_submodule(name.removesuffix(".weight"))
            raise InputError(
                f"The {roles[0]} of {type(source.model).__name__} is a {type(module).__name__} of "
                f"rows of {source.shape(name)[1]}, expected a plain linear or embedding of rows of "
                f"a multiple of 32. Set {roles[0]}_bits to {UNQUANTIZED}."
            )
    return widths


def _is_plain(source: Source, name: str) -> bool:
    """Whether a packed module can take the place of this one."""
    module = source.model.get_submodule(name.removesuffix(".weight"))
    plain = type(module) in (nn.Linear, nn.Embedding)
    return plain and fitting_group_size(source.shape(name)[1], GROUP_SIZES[0]) is not None


def free_widths(source: Source, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The widths offered to every tensor whose width is chosen with the experts', by its name."""
    return {
        name: END_BITS if name in source.ends else recipe.linear_bits
        for name, bits in asked_widths(source, recipe).items()
        if bits is None
    }


def offered_widths(free: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """All widths that any of `free_widths` is offered, rising."""
    return tuple(sorted({bits for widths in free.values() for bits in widths}))


def stored_bytes(source: Source, recipe: Recipe, name: str, bits: int) -> int:
    """Bytes of a tensor of `free_widths` at a width."""
    shape = source.shape(name)
    if bits == UNQUANTIZED:
        return shape.numel() * source.stored_dtype(name).itemsize
    return _spec(source, recipe, name, bits).nbytes(*shape)


def _spec(source: Source, recipe: Recipe, name: str, bits: int) -> PackedSpec:
    """How a linear or an end is packed. Ends are looked up by the row, or large: scalar."""
    cols = source.shape(name)[1]
    scalar = name in source.ends
    codec = codec_for(bits, cols, recipe.group_size) if scalar else linear_codec(bits, cols, recipe)
    return PackedSpec((bits,), codec.group_size, codec.family)


def linear_specs(
    source: Source, recipe: Recipe, chosen: Mapping[str, int] | None = None
) -> dict[str, PackedSpec]:
    """Packed tensors that are not routed experts, by parameter name.

    Args:
        chosen: widths of all tensors of `free_widths`; None: they are left out.

    Raises:
        InputError: `chosen` lacks one.
    """
    widths = asked_widths(source, recipe)
    if chosen is not None:
        left_open = {name for name, bits in widths.items() if bits is None}
        if lacking := sorted(left_open - chosen.keys()):
            raise InputError(
                f"The plan has no width for {len(lacking)} tensors that its recipe leaves open, "
                f"the first {lacking[0]}. Make it again with `moepress allocate`."
            )
        widths |= {name: chosen[name] for name in left_open}
    return {
        name: _spec(source, recipe, name, bits)
        for name, bits in widths.items()
        if bits is not None and bits != UNQUANTIZED
    }


def every_name(source: Source) -> list[str]:
    """All tensors of the model but the routed experts."""
    layers = [source.layer_path(i) for i in range(len(source.layers))]
    return [name for prefix in (None, *layers) for name in source.names(prefix)]


def fixed_bytes(
    source: Source, specs: Mapping[str, PackedSpec], left_out: Container[str] = ()
) -> int:
    """Stored bytes of all tensors but the routed experts and those in `left_out`."""
    total = 0
    for name in every_name(source):
        if name in left_out:
            continue
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
    free = free_widths(source, recipe)
    packed = [*linear_specs(source, recipe), *free, *expert_names]
    moe_layers, experts = len(source.experts), next(iter(source.experts.values())).experts
    headers = sum(len(name) + 68 for name in (*names, *expert_names)) + 32 * len(source.layers)
    index = sum(len(name) + 43 for name in (*names, *expert_names)) + 100
    entries = sum(len(name) + 75 for name in packed) + 2 * moe_layers * experts + 500
    plan = 1500 + moe_layers * (2 * experts + 75) + sum(len(name) + 10 for name in free)
    for names_of, family in ((expert_names, recipe.expert_codec), (free, recipe.linear_codec)):
        entries += 30 * len(names_of) * (family != "int")  # "family"
    arrays = 1 + len(recipe.calib)  # epsilon^2, and the cost on each source of text
    scores = 1400 + moe_layers * (16 + experts * (16 + 24 * len(recipe.expert_bits) * arrays))
    scores += sum(len(name) + 4 for name in free)
    scores += 8 * len(free) * len(offered_widths(free)) * (1 + len(recipe.calib))
    drops = 900 + moe_layers * (drop_bytes(chosen_experts(source.config)) + 5)
    copied = [*source.companions(), source.folder / "config.json"]
    return headers + index + entries + plan + scores + drops + sum(p.stat().st_size for p in copied)


def chosen_experts(config: Any) -> int:
    """k, as the config of most families has it; where another name is used, the usual 8."""
    return int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 8)
