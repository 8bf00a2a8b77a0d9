"""The operations on packed weights and on routing, and which backend runs them where.

    moepress::linear     x W^T + bias, W packed
    moepress::experts    the routed experts of one layer, each with widths of its own
    moepress::embedding  rows of a packed table
    moepress::drop       which chosen experts a token can do without

They are torch.library ops: torch.compile, torch.export and CUDA graphs see one node with a known
result shape, whatever runs inside. What runs is looked up in one table at every call: of the
backends made for the device's type, the one of highest rank that accepts the device. `reference`
accepts every device; where it stands in for a faster one, a warning says so, once, and `status()`
says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.kernels import cpu, reference

__all__ = [
    "BACKENDS",
    "Backend",
    "Status",
    "backend_for",
    "drop",
    "embedding",
    "experts",
    "linear",
    "only",
    "register_backend",
    "status",
]

logger = logging.getLogger(__name__)


class Linear(Protocol):
    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        codec: Codec,
        activation_bits: int,
    ) -> Tensor: ...


class Experts(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_table: Tensor,
        down_table: Tensor,
        intermediate_size: int,
        gate_up_group: int,
        down_group: int,
        activation: str,
        activation_bits: int,
        family: str,
    ) -> Tensor: ...


class Embedding(Protocol):
    def __call__(
        self, ids: Tensor, packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype
    ) -> Tensor: ...


class Drop(Protocol):
    def __call__(
        self,
        index: Tensor,
        weights: Tensor,
        thresholds: Tensor,
        renormalise: bool,
        keep: Tensor | None,
        num_experts: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations."""

    name: str
    rank: int  # of the backends that accept a device, the highest rank runs
    device_types: tuple[str, ...]  # torch device types it is made for; empty: all
    refuses: Callable[[torch.device], str | None]  # why it cannot run there; None: it can
    linear: Linear
    experts: Experts
    embedding: Embedding
    drop: Drop = reference.drop

    def made_for(self, device: torch.device) -> bool:
        return not self.device_types or device.type in self.device_types


@dataclass(frozen=True)
class Status:
    """What runs on a device, and why nothing better does."""

    device: str
    backend: str
    refused: Mapping[str, str]  # better backends made for this device: name to reason


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend to the table, or replace the one of that name."""
    BACKENDS[backend.name] = backend
    _choose.cache_clear()


@contextmanager
def only(name: str) -> Iterator[None]:
    """Inside the block no other backend runs: for comparisons, and where no rounding is wanted.

    Raises:
        InputError: there is no such backend.
    """
    if name not in BACKENDS:
        raise InputError(f"No backend is called '{name}'. Expected one of {sorted(BACKENDS)}.")
    all_of_them = dict(BACKENDS)
    BACKENDS.clear()
    register_backend(all_of_them[name])
    try:
        yield
    finally:
        BACKENDS.clear()
        for backend in all_of_them.values():
            register_backend(backend)


def backend_for(device: torch.device) -> Backend:
    """The backend that runs on a device."""
    return BACKENDS[_choose(device).backend]


def status() -> list[Status]:
    """What runs on each device of this machine: the CPU first, then the accelerators."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    devices = [torch.device(accelerator.type, i) for i in range(count)] if accelerator else []
    return [_choose(device) for device in (torch.device("cpu"), *devices)]


@lru_cache(maxsize=64)
def _choose(device: torch.device) -> Status:
    refused: dict[str, str] = {}
    ranked = sorted(BACKENDS.values(), key=lambda b: b.rank, reverse=True)
    for backend in (b for b in ranked if b.made_for(device)):
        reason = backend.refuses(device)
        if reason is None:
            for name, why in refused.items():  # cached, so each device is told once
                logger.warning("%s runs %s, not %s: %s", device, backend.name, name, why)
            return Status(str(device), backend.name, refused)
        refused[backend.name] = reason
    raise InputError(f"No backend runs on {device}: {refused or 'none is made for it'}.")


@torch.library.custom_op("moepress::linear", mutates_args=())
def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    activation_bits: int = 8,
    family: str = "int",
) -> Tensor:
    """x W^T + bias.

    Args:
        x: [..., K], a float dtype.
        packed: [Codec(bits, group_size, family).nbytes(N, K)] uint8, docs/format.md.
        bias: [N] in the dtype of x, or None.
        out_features: N.
        activation_bits: at least how precise activations stay. 8: a backend may round them to
            8-bit codes, one scale per group of columns; 16: to 15-bit ones, finer than bfloat16.

    Returns:
        [..., N] in the dtype of x.
    """
    codec = Codec(bits, group_size, family)
    _check_bytes("weight", packed, codec.nbytes(out_features, x.shape[-1]))
    _check_device(x, weight=packed, bias=bias)
    reference.check_activation_bits(activation_bits)
    if bias is not None and bias.shape != (out_features,):
        raise InputError(f"bias must be [{out_features}], got {list(bias.shape)}.")
    return backend_for(x.device).linear(x, packed, bias, out_features, codec, activation_bits)


@linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    activation_bits: int = 8,
    family: str = "int",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("moepress::experts", mutates_args=())
def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_table: Tensor,
    down_table: Tensor,
    intermediate_size: int,
    gate_up_group: int,
    down_group: int,
    activation: str,
    activation_bits: int = 8,
    family: str = "int",
) -> Tensor:
    """y_t = sum_k w_tk down_e(act(gate_e x_t) * up_e x_t), with e = index_tk.

    Args:
        hidden: [T, H], a float dtype: that of all matrix products.
        top_k_index: [T, k] int64. An index outside 0 .. E-1 contributes nothing.
        top_k_weights: [T, k], any float dtype; sums over k are in float32.
        gate_up: uint8, the packed [2I, H] matrices of all experts, gate rows first.
        down: uint8, the packed [H, I] matrices.
        gate_up_table, down_table: [E, 2] int64, (first byte, code bits) of each expert's matrix. An
            expert with 0 bits in both is left out: choosing it contributes nothing.
        intermediate_size: I.
        gate_up_group, down_group: group sizes.
        activation: a name in `reference.ACTIVATIONS`.
        activation_bits: as of `linear`, for both products.
        family: of the codecs of all matrices.

    Returns:
        [T, H] in the dtype of `hidden`.
    """
    _check_routing(hidden, top_k_index, top_k_weights)
    reference.check_activation_bits(activation_bits)
    _check_device(
        hidden,
        top_k_index=top_k_index,
        top_k_weights=top_k_weights,
        gate_up=gate_up,
        down=down,
        gate_up_table=gate_up_table,
        down_table=down_table,
    )
    for name, packed, table in (("gate_up", gate_up, gate_up_table), ("down", down, down_table)):
        _check_bytes(name, packed, packed.numel())
        if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 2:
            raise InputError(
                f"{name}_table must be [E, 2] int64, got {list(table.shape)} {table.dtype}."
            )
    return backend_for(hidden.device).experts(
        hidden,
        top_k_index,
        top_k_weights,
        gate_up,
        down,
        gate_up_table,
        down_table,
        intermediate_size,
        gate_up_group,
        down_group,
        activation,
        activation_bits,
        family,
    )


@experts.register_fake
def _(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_table: Tensor,
    down_table: Tensor,
    intermediate_size: int,
    gate_up_group: int,
    down_group: int,
    activation: str,
    activation_bits: int = 8,
    family: str = "int",
) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("moepress::embedding", mutates_args=())
def embedding(
    ids: Tensor,
    packed: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a packed [rows, cols] matrix: ids [...] int64 to [..., cols] of `dtype`."""
    codec = Codec(bits, group_size)
    _check_bytes("weight", packed, codec.nbytes(rows, cols))
    _check_device(ids, weight=packed)
    return backend_for(ids.device).embedding(ids, packed, rows, cols, codec, dtype)


@embedding.register_fake
def _(
    ids: Tensor,
    packed: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*ids.shape, cols), dtype=dtype)


def drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop a token's choices whose weight is small: the choice of rank r where w_r < t_r * w_1.

    Args:
        index: [T, k] int64; outside 0 .. E-1: no expert, of no weight, and nothing to drop.
        weights: [T, k] routing weights, in any order, any float dtype.
        thresholds: [k] float32, by rank; the first is 0, or a token may lose all.
        renormalise: whether what stays is scaled up to the sum of all.
        keep: [T] bool, tokens that keep all; None: none.
        num_experts: E, the index of a dropped choice; its weight is 0.

    Returns:
        Index and weights [T, k] by falling weight, and what was dropped, [T, k] bool.
    """
    # For one token the dispatcher takes longer than the work; a compiler needs to see the op.
    run = _drop_op if torch.compiler.is_compiling() else _drop
    return run(index, weights, thresholds, renormalise, keep, num_experts)


def _drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, k = index.shape
    if (
        weights.shape != index.shape
        or thresholds.shape != (k,)
        or thresholds.dtype != torch.float32
    ):
        raise InputError(
            "Expected top_k_index and top_k_weights [T, k] and thresholds [k] float32; got "
            f"{list(index.shape)}, {list(weights.shape)} and {list(thresholds.shape)} "
            f"{thresholds.dtype}."
        )
    if keep is not None and (keep.shape != (tokens,) or keep.dtype != torch.bool):
        raise InputError(f"keep must be [{tokens}] bool, got {list(keep.shape)} {keep.dtype}.")
    _check_device(index, weights=weights, thresholds=thresholds, keep=keep)
    backend = backend_for(index.device)
    return backend.drop(index, weights, thresholds, renormalise, keep, num_experts)


_drop_op = torch.library.custom_op("moepress::drop", _drop, mutates_args=())


@_drop_op.register_fake
def _(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = index.shape
    return (
        index.new_empty(shape),
        weights.new_empty(shape),
        index.new_empty(shape, dtype=torch.bool),
    )


def _check_bytes(name: str, packed: Tensor, expected: int) -> None:
    """Backends read by address: a wrong size must not reach them."""
    if packed.dtype != torch.uint8 or packed.shape != (expected,) or not packed.is_contiguous():
        raise InputError(
            f"The packed {name} must be [{expected}] uint8, contiguous; got {list(packed.shape)} "
            f"{packed.dtype}. docs/format.md has the layout."
        )


def _check_device(first: Tensor, **others: Tensor | None) -> None:
    """Backends read by address: an address of another device must not reach them."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise InputError(
                f"{name} is on {tensor.device}, the input on {first.device}. Move the model or the "
                "input, so that both are on one device."
            )


def _check_routing(hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    fits = hidden.dim() == index.dim() == 2 and len(hidden) == len(index)
    if not fits or index.shape != weights.shape or index.is_floating_point():
        raise InputError(
            "Expected hidden [T, H], top_k_index [T, k] of integers and top_k_weights [T, k]; got "
            f"{list(hidden.shape)}, {list(index.shape)} {index.dtype} and {list(weights.shape)}."
        )


register_backend(
    Backend(
        name="reference",
        rank=0,
        device_types=(),
        refuses=lambda device: None,
        linear=reference.linear,
        experts=reference.experts,
        embedding=reference.embedding,
    )
)
register_backend(
    Backend(
        name="cpu",
        rank=10,
        device_types=("cpu",),
        refuses=lambda device: cpu.missing(),
        linear=cpu.linear,
        experts=cpu.experts,
        embedding=cpu.embedding,
        drop=cpu.drop,
    )
)
