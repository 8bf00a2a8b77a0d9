"""The table of backends, and which of them runs on a device.

The choice is made at every call of an op: among the backends made for the device's type, the one
of highest rank that accepts the device. `reference` accepts every device. Where a backend runs in
place of a faster one that refused the device, one warning says so, and `status()` gives the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.kernels import cpu, cuda, reference, router, small_reference
from moepress.kernels.cpu import route as cpu_route
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.matrix import PackedMatrix
from moepress.kernels.router import Formula

logger = logging.getLogger(__name__)

# Implementations of the ops. Arguments, in order, and results are those of ops.py, except that a
# Codec stands for (bits, group_size, family).
Linear = Callable[  # x, packed, bias, out_features, codec, activation_bits
    [Tensor, Tensor, Tensor | None, int, Codec, int], Tensor
]
Linears = Callable[  # x, matrices, activation_bits
    [Tensor, Sequence[PackedMatrix], int], Tensor
]
Experts = Callable[[ExpertsCall], Tensor]
Embedding = Callable[  # ids, packed, rows, cols, codec, dtype
    [Tensor, Tensor, int, int, Codec, torch.dtype], Tensor
]
Drop = Callable[  # index, weights, thresholds, renormalise, keep, num_experts
    [Tensor, Tensor, Tensor, bool, Tensor | None, int], tuple[Tensor, Tensor, Tensor]
]

Attention = Callable[  # q, k, v, mask, scale
    [Tensor, Tensor, Tensor, Tensor | None, float], Tensor
]
RmsNorm = Callable[[Tensor, Tensor | None, float, str], Tensor]  # x, weight, eps, formula
Rotary = Callable[  # q, k, cos, sin, style, wide
    [Tensor, Tensor, Tensor, Tensor, str, bool], tuple[Tensor, Tensor]
]
CacheWrite = Callable[  # keys, values, key, value, position
    [Tensor, Tensor, Tensor, Tensor, Tensor], None
]
Route = Callable[  # hidden, weight, bias, correction, top_k, formula
    [Tensor, Tensor, Tensor | None, Tensor | None, int, Formula], tuple[Tensor, Tensor, Tensor]
]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops."""

    name: str
    rank: int  # among the backends that accept a device, the one of highest rank runs
    device_types: tuple[str, ...]  # torch device types it is made for; empty: all
    refuses: Callable[[torch.device], str | None]  # the reason why it cannot run there, or None
    linear: Linear
    experts: Experts
    embedding: Embedding
    drop: Drop = reference.drop
    attention: Attention = reference.attention
    linears: Linears | None = None  # None: one by one
    rms_norm: RmsNorm = small_reference.rms_norm
    rotary: Rotary = small_reference.rotary
    cache_write: CacheWrite = small_reference.cache_write
    route: Route = router.route

    def made_for(self, device: torch.device) -> bool:
        return not self.device_types or device.type in self.device_types


@dataclass(frozen=True)
class Status:
    """The backend that runs on a device, and why none of higher rank does."""

    device: str
    backend: str
    refused: Mapping[str, str]  # backends of higher rank made for this device: name to reason


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend to the table, or replace the one of the same name."""
    BACKENDS[backend.name] = backend
    _choose.cache_clear()


@contextmanager
def only(name: str) -> Iterator[None]:
    """Context in which only one backend runs: to compare backends, or to avoid rounding.

    Raises:
        InputError: there is no such backend.
    """
    if name not in BACKENDS:
        raise InputError(f"No backend is called '{name}'. Expected one of {sorted(BACKENDS)}.")
    before = dict(BACKENDS)
    BACKENDS.clear()
    register_backend(before[name])
    try:
        yield
    finally:
        BACKENDS.clear()
        for backend in before.values():
            register_backend(backend)


def backend_for(device: torch.device) -> Backend:
    """The backend that runs on a device.

    Raises:
        InputError: every backend made for the device refuses it.
    """
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
            for name, why in refused.items():  # this function is cached: one warning per device
                logger.warning("%s runs %s, not %s: %s", device, backend.name, name, why)
            return Status(str(device), backend.name, refused)
        refused[backend.name] = reason
    raise InputError(f"No backend runs on {device}: {refused or 'none is made for it'}.")


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
        rms_norm=cpu.rms_norm,
        rotary=cpu.rotary,
        cache_write=cpu.cache_write,
        route=cpu_route.route,
        attention=cpu.attention,
    )
)
register_backend(
    Backend(
        name="cuda",
        rank=10,
        device_types=("cuda",),
        refuses=cuda.missing,
        linear=cuda.linear,
        experts=cuda.experts,
        embedding=cuda.embedding,
        drop=cuda.drop,
        attention=cuda.attention,
        linears=cuda.linears,
        rms_norm=cuda.rms_norm,
        rotary=cuda.rotary,
        cache_write=cuda.cache_write,
        route=cuda.route,
    )
)
