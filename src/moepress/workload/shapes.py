"""The shapes of a model that decide how long its compression takes. No weight is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moepress.allocation.tensors import experts_per_token
from moepress.original.architectures import reads_experts
from moepress.original.loops import loop_of
from moepress.original.on_disk import disk_itemsizes
from moepress.original.source import Source
from moepress.rounding.sweep import in_16_bits

STATE = "A_log"  # in the name of a tensor that layers with a state have: how fast it decays
# Fields of a config whose product is the size of that state, by the names of families.
STATE_SIZES = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ("linear_num_heads", "linear_head_dim", "linear_head_dim"),
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    ("mamba_expand", "hidden_size", "mamba_d_state"),
)


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder layer that can be packed: a weight [rows, cols]."""

    name: str
    rows: int
    cols: int

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    @property
    def parent(self) -> str:
        """Path of the module that holds the linear."""
        return self.name.rsplit(".", 2)[0]


@dataclass(frozen=True)
class Layer:
    """A decoder layer without its routed experts."""

    weights: int  # of all its tensors
    linears: tuple[Linear, ...]
    has_experts: bool
    runs: int = 1  # how often a token goes through it: more than once in a loop
    state: int = 0  # elements of what it keeps of a text in place of keys and values

    def sharing_inputs(self, of: Collection[str]) -> list[tuple[Linear, ...]]:
        """The linears named in `of`, grouped by the inputs that they share.

        Which linears share inputs shows only when the layer runs. Assumed here: linears of one
        module with equally many inputs share them, except the last one, which has the outputs of
        the others as its inputs (q, k and v, then o; gate and up, then down).
        """
        groups: dict[tuple[str, int, bool], list[Linear]] = defaultdict(list)
        last = {linear.parent: linear.name for linear in self.linears}
        for linear in self.linears:
            if linear.name in of:
                is_last = last[linear.parent] == linear.name
                groups[linear.parent, linear.cols, is_last].append(linear)
        return [tuple(group) for group in groups.values()]

    def by_turn(self, of: Collection[str]) -> tuple[list[str], list[str]]:
        """The linears named in `of`: those before the experts, and those that read their outputs.

        The layer runs once for the inputs of the first, and once more for those of the others.
        """
        names = [linear.name for linear in self.linears if linear.name in of]
        behind = [name for name in names if reads_experts(name)]
        return [name for name in names if name not in behind], behind


@dataclass(frozen=True)
class ModelShape:
    """A model as far as the time and memory of its compression depend on it."""

    layers: tuple[Layer, ...]
    hidden: int  # H
    intermediate: int  # I of a routed expert, padded as it is packed
    experts: int  # E of a layer
    experts_per_token: int  # k
    vocabulary: int  # V
    heads: int
    head: int  # size of a head's queries and keys
    outside: int  # weights outside the layers: embedding, head, norms
    itemsize: int  # bytes of a weight in the model's dtype
    expert_disk: float  # bytes of a routed expert's weight on disk, with scales if it has them
    other_disk: float  # the same for all other weights
    compute_itemsize: int  # bytes of a weight in the dtype of the walk
    projected: int | None = None  # size of the experts' inputs and outputs, padded; None: H
    parts: int = 2  # matrices of I rows in an expert's first product: gate and up, or up alone
    products_in_16_bits: bool = False  # some of them (rounding/sweep.py)
    neurons: int | None = None  # of an expert, that a token chooses one by one; None: it uses all
    key_heads: int | None = None  # heads of keys and values; None: as many as of queries
    value_head: int | None = None  # size of a head's values; None: that of its keys

    @classmethod
    def of(cls, source: Source) -> ModelShape:
        config = source.text_config
        loop = loop_of(config, len(source.layers))
        one, chosen = source.one_layer_of_experts, experts_per_token(config)
        heads = _largest(config, "num_attention_heads") or 1
        sizes = (_largest(config, name) for name in ("qk_head_dim", "head_dim"))
        head = next(filter(None, sizes), source.hidden // heads)
        state = _state(config)
        expert_disk, other_disk = disk_itemsizes(source)
        return cls(
            layers=tuple(
                Layer(
                    sum(source.shape(name).numel() for name in source.names(path)),
                    tuple(Linear(name, *source.shape(name)) for name in source.packable[index]),
                    index in source.experts,
                    loop.runs(index),
                    state * any(STATE in name for name in source.names(path)),
                )
                for index, path in enumerate(source.layer_paths)
            ),
            hidden=source.hidden,
            intermediate=one.gate_up_shape[0] // one.form.parts,
            experts=one.experts,
            experts_per_token=min(chosen, one.experts),
            vocabulary=int(config.vocab_size),
            heads=heads,
            head=head,
            outside=sum(source.shape(name).numel() for name in source.names(None)),
            itemsize=source.dtype.itemsize,
            expert_disk=expert_disk,
            other_disk=other_disk,
            compute_itemsize=source.compute_dtype.itemsize,
            projected=one.gate_up_shape[1],
            parts=one.form.parts,
            products_in_16_bits=in_16_bits(source.compute_dtype, source.device),
            neurons=chosen if one.form.by_neuron else None,
            key_heads=_largest(config, "num_key_value_heads"),
            value_head=_largest(config, "v_head_dim"),
        )

    @property
    def attention(self) -> int:
        """Elements of the queries of a token."""
        return self.heads * self.head

    @property
    def cached(self) -> int:
        """Elements of the keys and values of a token in a layer that has them."""
        return (self.key_heads or self.heads) * (self.head + (self.value_head or self.head))

    @property
    def expert_hidden(self) -> int:
        """Size of the inputs and outputs of a routed expert."""
        return self.hidden if self.projected is None else self.projected

    @property
    def gate_up(self) -> tuple[int, int]:
        """Rows and columns of an expert's fused gate and up, or of up alone."""
        return self.parts * self.intermediate, self.expert_hidden

    @property
    def down(self) -> tuple[int, int]:
        """Rows and columns of an expert's down; of neurons it is a table with a row for each."""
        shape = self.expert_hidden, self.intermediate
        return shape if self.neurons is None else shape[::-1]

    @property
    def with_hessian(self) -> tuple[tuple[int, int], ...]:
        """The matrices of an expert whose rounding needs a Hessian; that of neurons is diagonal."""
        return (self.gate_up, self.down) if self.neurons is None else (self.gate_up,)

    @property
    def inner(self) -> int:
        """Inner activations of what `expert_tokens` counts: I, or 1 of a single neuron."""
        return self.intermediate if self.neurons is None else 1

    @property
    def used_weights(self) -> int:
        """Weights of an expert that each of what `expert_tokens` counts is multiplied by."""
        return self.expert_weights * self.inner // self.intermediate

    @property
    def used(self) -> float:
        """Share of a layer's experts, or of their neurons, that a token chooses."""
        if self.neurons is not None:
            return self.neurons / (self.experts * self.intermediate)
        return self.experts_per_token / self.experts

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert."""
        return (self.parts + 1) * self.expert_hidden * self.intermediate

    @cached_property
    def weights(self) -> int:
        """Number of weights of the model."""
        inside = sum(layer.weights for layer in self.layers)
        return self.outside + inside + self.moe_layers * self.experts * self.expert_weights

    @property
    def disk_bytes(self) -> float:
        """Bytes of the model's weights on disk."""
        experts = self.moe_layers * self.experts * self.expert_weights
        return experts * self.expert_disk + (self.weights - experts) * self.other_disk

    @property
    def moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return sum(layer.has_experts for layer in self.layers)

    def expert_tokens(self, tokens: int) -> int:
        """Tokens of one expert if all experts are chosen equally often.

        A token that chooses neurons counts once for each.
        """
        if self.neurons is not None:
            return -(-tokens * self.neurons // self.experts)
        return -(-tokens * self.experts_per_token // self.experts)


def _state(config: Any) -> int:
    """Elements of the state of a linear attention or Mamba layer; 0: none is known."""
    for names in STATE_SIZES:
        sizes = [size for name in names if isinstance(size := getattr(config, name, None), int)]
        if len(sizes) == len(names) and all(sizes):
            return math.prod(sizes)
    return 0


def _largest(config: Any, name: str) -> int | None:
    """The largest value of a field, which some families set layer by layer; None: it has none."""
    layers = [config]
    if getattr(config, "is_heterogeneous", False):  # then the config itself refuses to tell
        layers = list(config.per_layer_config)
    return max((int(v) for layer in layers if (v := getattr(layer, name, None))), default=None)
