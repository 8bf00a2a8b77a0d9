"""Modules whose weights stay packed in memory.

Each replaces a module of a transformers model and keeps its parameter names on purpose: `weight`,
`gate_up_proj` (`up_proj` without a gate), `down_proj` are now one-dimensional uint8. A compressed
checkpoint that is opened without moepress then fails on the sizes instead of running with random
weights.

Packed bytes are not numbers: `.to(dtype)` and `.half()` leave them alone, and they get no gradient.
`weight.dtype` is uint8, as of bitsandbytes' 4-bit linears: transformers' code asks for it to tell
that a weight is packed, and a tensor that named another dtype than its bytes have could not be
saved, moved or compiled as what it is. Ask `model.dtype` for the dtype of activations.
Inputs, routing weights and biases do (gradients.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import LEFT_OUT, Codec, PackedSpec, pre_quant_scale_of
from moepress.kernels.gate import Gate, packed_names
from moepress.kernels.reference import activation_function, check_activation_bits
from moepress.kernels.stores import StoredLayer, refuse


class PackedLinear(nn.Linear):
    """`nn.Linear` with a packed weight; a subclass of it, so that PEFT puts adapters around it.

    Args:
        in_features: K; the codec's group size must divide it.
        out_features: N.
        codec: how the weight [N, K] is stored.
        bias: whether there is a bias [N], in torch's default dtype.
    """

    activation_bits = 8  # see set_activation_bits
    bias: nn.Parameter | None  # type: ignore[assignment]  # torch says that there always is one
    _is_hf_initialized = True  # else transformers fills a linear on disk with random numbers

    def __init__(
        self, in_features: int, out_features: int, codec: Codec, bias: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.codec = codec
        self.weight = _packed(codec.nbytes(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def joins(self) -> bool:
        """Whether it can be one of the matrices of `moepress::linears`."""
        return type(self) is PackedLinear and self.bias is None and self.codec.family == "trellis"

    def forward(self, x: Tensor) -> Tensor:
        codec = self.codec
        y: Tensor = kernels.linear(
            x,
            self.weight,
            self.bias,
            self.out_features,
            codec.number,
            codec.group_size,
            self.activation_bits,
            codec.family,
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.codec.name}, {self.weight.numel():,} bytes"
        )


class PackedEmbedding(nn.Module):
    """`nn.Embedding` with a packed table; each call unpacks only the rows it needs.

    The result has the dtype of the buffer `like`, which follows `.to(dtype)` as weights would.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: length of a row; the codec's group size must divide it.
        codec: how the table is stored.
    """

    like: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, codec: Codec) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.codec = codec
        self.weight = _packed(codec.nbytes(num_embeddings, embedding_dim))
        self.register_buffer("like", torch.zeros(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows, cols, codec = self.num_embeddings, self.embedding_dim, self.codec
        y: Tensor = kernels.embedding(
            ids, self.weight, rows, cols, codec.number, codec.group_size, self.like.dtype
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {self.codec.name}, "
            f"{self.weight.numel():,} bytes"
        )


class PackedExperts(nn.Module):
    """The routed experts of one layer, each matrix with its own width.

    Called as transformers calls its experts: hidden_states [T, H], top_k_index [T, k] int64,
    top_k_weights [T, k]; returns [T, H] on their device. Two kinds of index contribute nothing:
    those outside 0 .. E-1, and experts that are left out, which have 0 bits in both projections.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        gate_up: widths of the E matrices [R, H]: R = 2I, gate rows first; I without a gate.
        down: widths of the E matrices [H, I].
        gate: what lies between the two products. Without a gate the parameter of the first is
            called `up_proj`, else `gate_up_proj`.
        gate_up_bias, down_bias: whether there are biases, the parameters `gate_up_proj_bias` (or
            `up_proj_bias`) [E, R] and `down_proj_bias` [E, H], in torch's default dtype. If
            `gate_up` says so, there is `gate_up_proj_pre_quant_scale` [H] too: inputs times it.

    Raises:
        InputError: the activation function is not supported, the widths are not those of E experts,
            or only one projection of an expert has 0 bits.
    """

    activation_bits = 8  # see set_activation_bits

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        gate_up: PackedSpec,
        down: PackedSpec,
        gate: Gate,
        gate_up_bias: bool = False,
        down_bias: bool = False,
    ) -> None:
        super().__init__()
        activation_function(gate.activation)  # raises InputError for an unknown name
        first, _ = packed_names(gate.gated)
        for name, spec in ((first, gate_up), ("down_proj", down)):
            if len(spec.bits) != num_experts:
                raise InputError(
                    f"{name} has {num_experts} experts, but {len(spec.bits)} widths are given. "
                    "Expected one width per expert."
                )
        for expert, pair in enumerate(zip(gate_up.bits, down.bits, strict=True)):
            if LEFT_OUT in pair and pair != (LEFT_OUT, LEFT_OUT):
                raise InputError(
                    f"Expert {expert} has {pair[0]} and {pair[1]} bits in {first} and "
                    "down_proj. Expected 0 in both or in neither: an expert is left out whole."
                )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.gate = gate
        self.first_name = first
        self._describe(intermediate_size, gate_up, down)
        gate_up_shape, down_shape = self.shapes
        self.register_parameter(first, _packed(gate_up.nbytes(*gate_up_shape)))
        self.down_proj = _packed(down.nbytes(*down_shape))
        self.register_parameter(f"{first}_bias", _biases(gate_up_bias, num_experts, gate_up_shape))
        self.register_parameter("down_proj_bias", _biases(down_bias, num_experts, down_shape))
        self._scale_name = pre_quant_scale_of(first)
        scale = nn.Parameter(torch.ones(hidden_size)) if gate_up.pre_quant_scale else None
        self.register_parameter(self._scale_name, scale)

    def _describe(self, intermediate_size: int, gate_up: PackedSpec, down: PackedSpec) -> None:
        """Set inner size and widths, and the tables that follow from them."""
        self.intermediate_size = intermediate_size
        self.gate_up = gate_up
        self.down = down
        gate_up_shape, down_shape = self.shapes
        # (first byte, `width_number`) of each expert's matrices, [E, 2] int64, of gate_up and down.
        # Not buffers: transformers fills non-persistent buffers with garbage after loading, and
        # accelerate may page them out. The masters stay on the CPU, even in a model built on meta.
        self._tables = (
            torch.tensor(gate_up.table(*gate_up_shape), device="cpu"),
            torch.tensor(down.table(*down_shape), device="cpu"),
        )
        self._tables_here = self._tables  # copies on a device, see place_tables
        self._stored: StoredLayer | None = None
        self.left_out = tuple(e for e, bits in enumerate(gate_up.bits) if bits == LEFT_OUT)

    def become(
        self,
        intermediate_size: int,
        gate_up: PackedSpec,
        down: PackedSpec,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Hold other matrices: the part of these experts that one of several devices computes.

        Args:
            intermediate_size, gate_up, down: as of the class, for as many experts.
            tensors: new values of parameters, by name.
        """
        self._describe(intermediate_size, gate_up, down)
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the first product's matrices, and of the second's."""
        inner, hidden = self.intermediate_size, self.hidden_size
        return (self.gate.parts * inner, hidden), (hidden, inner)

    @property
    def first_proj(self) -> nn.Parameter:
        """The packed matrices of the first product: `gate_up_proj`, or `up_proj` without a gate."""
        return self.get_parameter(self.first_name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute where the matrices are: if that is another device, activations go there."""
        if (scale := self._parameters[self._scale_name]) is not None:
            # Without the padding of packed matrices.
            hidden_states = hidden_states * scale[: hidden_states.shape[-1]].to(hidden_states)
        here, there = hidden_states.device, self.packed[0].device
        if here == there:
            return self._compute(hidden_states, top_k_index, top_k_weights)
        moved = (x.to(there) for x in (hidden_states, top_k_index, top_k_weights))
        return self._compute(*moved).to(here)

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._tables_here[0].device != hidden_states.device:
            self.place_tables(hidden_states.device)
        stored = self._stored
        gate, gate_up, down = self.gate, *self.packed
        y: Tensor = kernels.experts(  # the fields of ExpertsCall
            hidden_states,
            top_k_index,
            top_k_weights,
            gate_up,
            down,
            *self._tables_here,
            self.intermediate_size,
            self.gate_up.group_size,
            self.down.group_size,
            gate.activation,
            self.activation_bits,
            self.gate_up.family,
            self._parameters[f"{self.first_name}_bias"],
            self._parameters["down_proj_bias"],
            gate.gated,
            gate.limit,
            gate.alpha,
            gate.up_offset,
            gate.limits_output,
            gate.gate_softcap,
            gate.up_softcap,
            *((0, 0) if stored is None else (stored.store.number, stored.layer)),
        )
        return y

    def without_matrices(self) -> None:
        """Remove the parameters of the packed matrices: `read_from` will say where they are."""
        for name in packed_names(self.gate.gated):
            del self._parameters[name]

    def read_from(self, stored: StoredLayer) -> None:
        """Take the packed matrices from a store, in place of parameters (`without_matrices`)."""
        self._stored = stored
        self._tables = self._tables_here = stored.gate_up_table, stored.down_table

    @property
    def stored(self) -> StoredLayer | None:
        """Where the packed matrices are, if they are no parameters."""
        return self._stored

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        """The bytes that the two tables refer to."""
        if self._stored is not None:
            return self._stored.region, self._stored.region
        return self.first_proj, self.down_proj

    def _save_to_state_dict(self, *args: Any, **named: Any) -> None:
        if self._stored is not None:
            refuse("saved")
        super()._save_to_state_dict(*args, **named)

    def place_tables(self, device: torch.device) -> None:
        """Copy the tables to a device.

        `forward` does so where it has to, but it cannot while a CUDA graph is captured. So loading
        and `.to` do it before.
        """
        gate_up_table, down_table = self._tables
        self._tables_here = gate_up_table.to(device), down_table.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        first = self._parameters.get(self.first_name)
        if first is not None and not first.is_meta:
            self.place_tables(first.device)
        return self

    def extra_repr(self) -> str:
        gate_up_shape, down_shape = self.shapes
        size = self.gate_up.nbytes(*gate_up_shape) + self.down.nbytes(*down_shape)
        where = "" if self._stored is None else " on disk"
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, gate={self.gate}, "
            f"gate_up={_summary(self.gate_up)}, down={_summary(self.down)}, {size:,} bytes{where}"
        )


def set_activation_bits(model: nn.Module, bits: int) -> None:
    """Set the precision of activations inside the packed products of a model: 8 (default) or 16.

    Kernels that multiply integers round activations, one scale per group of columns. At 16 bits
    they keep 15 bits, more than bfloat16 has, and take up to twice the arithmetic.

    Raises:
        InputError: other bits, or the model has no packed weights.
    """
    packed = [m for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)]
    check_activation_bits(bits)
    if not packed:
        raise InputError(
            f"{type(model).__name__} has no packed weights. Expected a model that was loaded from "
            "a compressed folder."
        )
    for module in packed:
        module.activation_bits = bits


def _packed(nbytes: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(nbytes, dtype=torch.uint8), requires_grad=False)


def _biases(wanted: bool, experts: int, shape: tuple[int, int]) -> nn.Parameter | None:
    """Biases of the experts' matrices of that shape, or None."""
    return nn.Parameter(torch.zeros(experts, shape[0])) if wanted else None


def _summary(spec: PackedSpec) -> str:
    counts = sorted(Counter(spec.bits).items())
    widths = "+".join(
        f"{count} left out" if bits == LEFT_OUT else f"{count}x{bits}-bit" for bits, count in counts
    )
    family = "" if spec.family == "int" else f" {spec.family}"
    return f"{widths}{family} g{spec.group_size}"
