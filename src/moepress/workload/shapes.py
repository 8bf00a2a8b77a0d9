"""The shapes of a model that decide how long its compression takes. No weight is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from moepress.allocation.tensors import experts_per_token
from moepress.original.on_disk import disk_itemsizes
from moepress.original.source import Source


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


@dataclass(frozen=True)
class ModelShape:
    """A model as far as the time and memory of its compression depend on it."""

    layers: tuple[Layer, ...]
    hidden: int  # H
    intermediate: int  # I of a routed expert
    experts: int  # E of a layer
    experts_per_token: int  # k
    vocabulary: int  # V
    heads: int
    head: int  # size of a head
    outside: int  # weights outside the layers: embedding, head, norms
    itemsize: int  # bytes of a weight in the model's dtype
    expert_disk: float  # bytes of a routed expert's weight on disk, with scales if it has them
    other_disk: float  # the same for all other weights
    compute_itemsize: int  # bytes of a weight in the dtype of the walk

    @classmethod
    def of(cls, source: Source) -> ModelShape:
        config = source.config.get_text_config()
        one = source.one_layer_of_experts
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        head = int(getattr(config, "head_dim", None) or one.hidden // heads)
        expert_disk, other_disk = disk_itemsizes(source)
        return cls(
            layers=tuple(
                Layer(
                    sum(source.shape(name).numel() for name in source.names(path)),
                    tuple(Linear(name, *source.shape(name)) for name in source.packable[index]),
                    index in source.experts,
                )
                for index, path in enumerate(source.layer_paths)
            ),
            hidden=one.hidden,
            intermediate=one.intermediate,
            experts=one.experts,
            experts_per_token=min(experts_per_token(source.config), one.experts),
            vocabulary=int(config.vocab_size),
            heads=heads,
            head=head,
            outside=sum(source.shape(name).numel() for name in source.names(None)),
            itemsize=source.dtype.itemsize,
            expert_disk=expert_disk,
            other_disk=other_disk,
            compute_itemsize=source.compute_dtype.itemsize,
        )

    @property
    def attention(self) -> int:
        """Elements of the queries of a token."""
        return self.heads * self.head

    @property
    def gate_up(self) -> tuple[int, int]:
        """Rows and columns of an expert's fused gate and up."""
        return 2 * self.intermediate, self.hidden

    @property
    def down(self) -> tuple[int, int]:
        """Rows and columns of an expert's down."""
        return self.hidden, self.intermediate

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert."""
        return 3 * self.hidden * self.intermediate

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
        """Tokens of one expert if all experts are chosen equally often."""
        return -(-tokens * self.experts_per_token // self.experts)
