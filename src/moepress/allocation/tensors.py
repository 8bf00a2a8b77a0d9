"""The tensors of a compressed folder, computed from a model's shapes before any weight is read.

For every tensor that is not a routed expert: the widths it may take, how it is packed at each, and
its stored bytes. The allocator's budget and the estimated size of the folder both use this.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from moepress.costs.drop_costs import drop_bytes
from moepress.errors import InputError
from moepress.format.codec import (
    GROUP_SIZES,
    HALF_WIDTHS,
    LEFT_OUT,
    PackedSpec,
    codec_for,
    fitting_group_size,
    stored_family,
)
from moepress.original.architectures import linear_role
from moepress.original.companions import companions
from moepress.original.source import Source
from moepress.recipe import FALLBACK_BITS, TABLE_BITS, UNQUANTIZED, Recipe

logger = logging.getLogger(__name__)

# Names of k in configs. DBRX has it in a config of its own for the experts.
PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class ModelTensors:
    """All tensors of a model except its routed experts.

    M open tensors; W different widths are offered to any of them.
    """

    fixed: Mapping[str, int]  # width from the recipe, by parameter name; UNQUANTIZED: not packed
    open: Mapping[str, tuple[int, ...]]  # [M] widths offered, rising, by parameter name
    tables: Mapping[str, tuple[str, ...]]  # roles of embedding and head, by parameter name
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors
    unpacked_bytes: Mapping[str, int]  # stored bytes of each tensor if it is not packed
    family: str  # of the linears' codecs; widths it lacks are scalar
    group_size: int

    @classmethod
    def of(cls, source: Source, recipe: Recipe) -> ModelTensors:
        """The tensors of a model under a recipe.

        Raises:
            InputError: the recipe packs an embedding or a head that cannot be packed.
        """
        asked = _asked_widths(source, recipe)
        return cls(
            fixed={name: bits for name, bits in asked.items() if bits is not None},
            open={
                name: TABLE_BITS if name in source.embedding_and_head else recipe.linear_bits
                for name, bits in asked.items()
                if bits is None
            },
            tables=source.embedding_and_head,
            shapes={name: tuple(source.shape(name)) for name in source.all_names},
            unpacked_bytes={name: source.nbytes(name) for name in source.all_names},
            family=recipe.linear_codec,
            group_size=recipe.group_size,
        )

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """[W] all widths that any open tensor is offered, rising."""
        return tuple(sorted({bits for widths in self.open.values() for bits in widths}))

    @cached_property
    def open_tables(self) -> dict[str, tuple[str, ...]]:
        """Roles of the embedding and the head, where their width is open."""
        return {name: roles for name, roles in self.tables.items() if name in self.open}

    def spec(self, name: str, bits: int) -> PackedSpec:
        """How a tensor is packed at a width.

        Embedding and head always have scalar codes: embeddings are read row by row, and both are
        large.
        """
        family = "int" if name in self.tables else stored_family(bits, self.family)
        codec = codec_for(bits, self.shapes[name][1], self.group_size, family)
        return PackedSpec((bits,), codec.group_size, codec.family)

    def nbytes(self, name: str, bits: int) -> int:
        """Stored bytes of a tensor at a width."""
        if bits == UNQUANTIZED:
            return self.unpacked_bytes[name]
        rows, cols = self.shapes[name]
        return self.spec(name, bits).nbytes(rows, cols)

    @cached_property
    def fixed_specs(self) -> dict[str, PackedSpec]:
        """The fixed tensors that are packed, by parameter name."""
        return self._specs(self.fixed)

    def specs(self, chosen: Mapping[str, int]) -> dict[str, PackedSpec]:
        """All packed tensors, by parameter name.

        Args:
            chosen: width of every open tensor.

        Raises:
            InputError: `chosen` lacks one.
        """
        if missing := sorted(self.open.keys() - chosen.keys()):
            raise InputError(
                f"The plan has no width for {len(missing)} tensors that its recipe leaves open, "
                f"the first {missing[0]}. Make it again with `moepress allocate`."
            )
        return self.fixed_specs | self._specs({name: chosen[name] for name in self.open})

    def _specs(self, widths: Mapping[str, int]) -> dict[str, PackedSpec]:
        return {name: self.spec(name, bits) for name, bits in widths.items() if bits != UNQUANTIZED}

    @property
    def fixed_bytes(self) -> int:
        """Stored bytes of all tensors whose width is not open."""
        return sum(
            self.nbytes(name, self.fixed.get(name, UNQUANTIZED))
            for name in self.shapes
            if name not in self.open
        )


def _asked_widths(source: Source, recipe: Recipe) -> dict[str, int | None]:
    """The recipe's width of every tensor that can be packed; None: its width is open."""
    widths = {
        name: _linear_bits(source.role(layer, name), recipe)
        for layer, linears in enumerate(source.packable)
        for name in linears
    }
    for name, roles in source.embedding_and_head.items():
        bits = _table_bits(source, roles, recipe)
        if _can_be_packed(source, name):
            widths[name] = bits
        elif bits not in (None, UNQUANTIZED):
            raise InputError(
                f"The {roles[0]} of {type(source.model).__name__} is a "
                f"{type(source.module(name)).__name__} of rows of {source.shape(name)[1]}, "
                "expected a plain linear or embedding of rows of a multiple of 32 that "
                "transformers does not keep in float32. Set "
                f"{roles[0]}_bits to {UNQUANTIZED}."
            )
    return widths


def _linear_bits(role: str | None, recipe: Recipe) -> int | None:
    """The recipe's width of linears of a role; None: it is open."""
    bits: int | None = getattr(recipe, f"{role}_bits")
    return FALLBACK_BITS if bits is None and recipe.sensitivity == "none" else bits


def _table_bits(source: Source, roles: Sequence[str], recipe: Recipe) -> int | None:
    """The recipe's width of an embedding or head; None: it is open.

    Raises:
        InputError: embedding and head are one tensor, and the recipe gives them two widths.
    """
    widths = {getattr(recipe, f"{role}_bits") for role in roles}
    if len(widths) > 1:
        raise InputError(
            f"{source.name} ties its head to its embedding: they are one tensor. Set head_bits "
            f"({recipe.head_bits}) and embedding_bits ({recipe.embedding_bits}) alike."
        )
    (bits,) = widths
    return UNQUANTIZED if bits is None and recipe.sensitivity == "none" else bits


def _can_be_packed(source: Source, name: str) -> bool:
    """Whether a packed module can stand in for this embedding or head.

    Not for a head that transformers keeps in float32 (hy_v4).
    """
    plain = type(source.module(name)) in (nn.Linear, nn.Embedding)
    plain = plain and source.has_models_dtype(name)
    return plain and fitting_group_size(source.shape(name)[1], GROUP_SIZES[0]) is not None


def with_fitting_codec(source: Source, recipe: Recipe) -> Recipe:
    """The recipe with a codec that the model's experts can have.

    Neurons that tokens choose one by one are read row by row, so they have scalar codes.

    Raises:
        InputError: the recipe may leave experts out, and all neurons of a layer are one expert.
    """
    if not source.one_layer_of_experts.form.by_neuron:
        return recipe
    if LEFT_OUT in recipe.expert_bits:
        raise InputError(
            f"expert_bits offers {list(recipe.expert_bits)}, but tokens of "
            f"{type(source.model).__name__} choose single neurons, of which all of a layer have "
            "one width. Expected widths above 0."
        )
    if recipe.expert_codec == "int":
        return recipe
    logger.warning(
        "tokens of %s choose single neurons, which are read row by row: their codes are scalar",
        type(source.model).__name__,
    )
    return recipe.with_changes(expert_codec="int")


def check_group_sizes(source: Source, recipe: Recipe) -> None:
    """Warn where rows must be padded, or the recipe's group size cannot be used."""
    one = source.one_layer_of_experts
    form = one.form
    for name, (_, real), (_, cols) in zip(form.names, form.shapes, form.packed_shapes, strict=True):
        if real != cols:
            logger.warning(
                "the %d inputs of %s are padded to %d: 32 must divide them", real, name, cols
            )
        bits = recipe.widths[0]
        family = stored_family(bits, recipe.expert_codec)
        group = codec_for(bits, cols, recipe.group_size, family).group_size
        if group != recipe.group_size:
            logger.warning(
                "group size %d does not divide the %d inputs of %s; %d is used there",
                recipe.group_size, cols, name, group,
            )  # fmt: skip
    unquantized = {
        path
        for layer, module in enumerate(source.layers)
        for path, linear in module.named_modules()
        if type(linear) is nn.Linear
        and linear_role(path, layer in source.experts) is not None
        and fitting_group_size(linear.in_features, recipe.group_size) is None
    }
    if unquantized:
        logger.warning(
            "linears whose rows no group size divides stay unquantized: %s",
            ", ".join(sorted(unquantized)),
        )


def file_bytes(source: Source, recipe: Recipe, tensors: ModelTensors) -> int:
    """Estimated bytes of a compressed folder without its tensors: tokenizer, JSON, headers, scores.

    They are negligible for a large model, and a good share of the folder of a small one. The
    constants are the bytes that moepress's files take for each entry, names not counted
    (docs/format.md shows the files).
    """
    names, open_names = source.all_names, tensors.open
    expert_names = [name for experts in source.experts.values() for name in experts.parameters]
    packed = [*tensors.fixed_specs, *open_names, *expert_names]
    moe_layers, experts = len(source.experts), source.one_layer_of_experts.experts
    headers = sum(len(name) + 68 for name in (*names, *expert_names)) + 32 * len(source.layers)
    index = sum(len(name) + 43 for name in (*names, *expert_names)) + 100
    # Characters of an expert's width, "2," or "2.5,"; "2" where all are whole.
    spelt = 3 if set(HALF_WIDTHS) & set(recipe.expert_bits) else 1
    entries = sum(len(name) + 75 for name in packed) + 2 * spelt * moe_layers * experts + 500
    plan = (
        1500 + moe_layers * (2 * spelt * experts + 75) + sum(len(name) + 10 for name in open_names)
    )
    for group, family in ((expert_names, recipe.expert_codec), (open_names, recipe.linear_codec)):
        entries += 30 * len(group) * (family != "int")  # "family"
    arrays = 1 + len(recipe.calib)  # epsilon^2, and the cost on each text
    scores = 1400 + moe_layers * (16 + experts * (16 + 24 * len(recipe.expert_bits) * arrays))
    scores += sum(len(name) + 4 for name in open_names)
    scores += 8 * len(open_names) * len(tensors.widths) * (1 + len(recipe.calib))
    # The recipe, with the names of the texts, is in the plan and in the scores.
    texts = sum(2 * len(json.dumps(name)) + 100 for name, _ in recipe.calib)
    drops = 900 + moe_layers * (drop_bytes(experts_per_token(source.text_config)) + 5)
    copied = [*companions(source.folder).values(), source.folder / "config.json"]
    ours = headers + index + entries + plan + scores + texts + drops
    return ours + sum(path.stat().st_size for path in copied)


def experts_per_token(config: Any) -> int:
    """k, experts per token, under one of the names that families use; else the usual 8."""
    places = [config, getattr(config, "ffn_config", None)]
    found = (getattr(place, name, None) for place in places for name in PER_TOKEN)
    return next((int(k) for k in found if k), 8)
