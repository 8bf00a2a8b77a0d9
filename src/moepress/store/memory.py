"""How much memory a model may take, as a user says it and as the system has it.

`Memory` is the machine's, `GpuMemory` the card's. Both are for weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from moepress.byte_units import size_text
from moepress.errors import InputError
from moepress.memory import free_host_memory
from moepress.recipe import parse_size

Memory = int | Literal["all", "mapped", "fit"]  # bytes; all in locked memory; as files; see `plan`
GpuMemory = int | Literal["fit"]  # bytes; as much as is free

VARIABLE = "MOEPRESS_MEMORY"  # environment: for models opened with transformers alone
WHOLE_SHARE = 0.9  # of the free memory: models of more bytes than that are not taken whole
STORE_SHARE = 0.8  # of the free memory that weights then take; the rest is for activations, caches

# Of a folder whose experts are neurons that tokens choose one by one (`Form.by_neuron`).
WITHOUT_EXPERTS = "has tables of neurons and no experts that could stay on disk or leave a card"
_wanted: ContextVar[Memory | None] = ContextVar("moepress_memory", default=None)
_gpu_wanted: ContextVar[GpuMemory | None] = ContextVar("moepress_gpu_memory", default=None)


def parse_gpu_memory(text: str | int | None) -> int | None:
    """The memory of a card for weights that a user gives: bytes, a size such as "20GB", or None.

    Raises:
        InputError: it is none of them.
    """
    return None if text is None else _parse_bytes(text, "GPU memory", "a size such as 20GB")


def parse_memory(text: str | int | None) -> Memory | None:
    """The memory that a user asks for.

    Args:
        text: bytes, a size such as "12GB" or "512MiB", "all", "mapped", "fit", or None.

    Raises:
        InputError: it is none of them.
    """
    if text is None:
        return None
    if isinstance(text, str) and text.strip().lower() in ("all", "mapped", "fit"):
        return text.strip().lower()  # type: ignore[return-value]  # mypy does not narrow
    others = (
        "'all' to read everything and lock it, 'mapped' to leave it to the system, or 'fit' to do "
        "so if the model fits"
    )
    return _parse_bytes(text, "Memory", f"a size such as 12GB, {others}")


def _parse_bytes(text: str | int, what: str, expected: str) -> int:
    try:
        nbytes = parse_size(str(text))
    except InputError:
        nbytes = 0
    if not 1 <= nbytes < 2**62:
        raise InputError(f"{what} {text!r} is not understood. Expected {expected}.")
    return nbytes


@contextmanager
def memory_wanted(memory: Memory | None, gpu_memory: GpuMemory | None = None) -> Iterator[None]:
    """Context in which models are opened with that memory; None: as outside."""
    token = _wanted.set(memory if memory is not None else _wanted.get())
    gpu_token = _gpu_wanted.set(gpu_memory if gpu_memory is not None else _gpu_wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)
        _gpu_wanted.reset(gpu_token)


def wanted(otherwise: Memory = "mapped") -> Memory:
    """The memory for a model that is opened now: of the context, else of the environment.

    Args:
        otherwise: if neither says anything.

    Raises:
        InputError: the environment variable is not understood.
    """
    return _wanted.get() or parse_memory(os.environ.get(VARIABLE) or None) or otherwise


def gpu_wanted() -> GpuMemory | None:
    """The card's memory for a model that is opened now; None: its device map alone decides."""
    return _gpu_wanted.get()


@dataclass(frozen=True)
class Room:
    """What becomes of a model's experts."""

    experts: int  # bytes of memory for them
    locked: bool  # read everything at once, and keep the system from evicting it


def refuse_bytes(model: str) -> None:
    """Raise InputError if a number of bytes is wanted: of a model without experts to divide."""
    if isinstance(wanted(), int) or isinstance(gpu_wanted(), int):
        raise InputError(
            f"{model} {WITHOUT_EXPERTS}. Expected no number of bytes for its memory: give none."
        )


def plan(memory: Memory, experts: int, rest: int) -> Room | None:
    """Room for the experts of a model; None: its files are mapped.

    Args:
        memory: bytes for all weights; "fit": mapped if the model fits in free memory, else a store
            that leaves some memory free.
        experts: bytes of all experts, in whole pages.
        rest: bytes of the other weights, which always stay in memory.

    Raises:
        InputError: the memory does not hold the other weights.
    """
    if memory == "mapped" or experts == 0:
        return None
    if memory == "all":
        return Room(experts, locked=True)
    if memory == "fit":
        free = free_host_memory()
        if experts + rest <= WHOLE_SHARE * free:
            return None
        memory = int(STORE_SHARE * free)
    if memory <= rest:
        raise InputError(
            f"The memory for weights is {size_text(memory)}, and those outside the experts take "
            f"{size_text(rest)}. Give more than {rest:,} bytes."
        )
    return Room(min(memory - rest, experts), locked=False)


def host_room(memory: Memory, experts: int) -> Room:
    """Room for the experts that a card leaves to the CPU.

    Args:
        memory: bytes for them; "fit" or "mapped": all if they fit in free memory, else as many as
            leave some free.
        experts: bytes of them, in whole pages.
    """
    if memory == "all":
        return Room(experts, locked=True)
    if memory in ("fit", "mapped"):
        free = free_host_memory()
        memory = experts if experts <= WHOLE_SHARE * free else int(STORE_SHARE * free)
    return Room(min(int(memory), experts), locked=False)


def card_room(free: int, weights: int) -> int:
    """Bytes of a card for weights, of those that are free: more if the model then fits whole."""
    return int((WHOLE_SHARE if weights <= WHOLE_SHARE * free else STORE_SHARE) * free)


def card_budget(gpu_memory: GpuMemory, experts: int, rest: int, free: int) -> int | None:
    """Bytes of a model's experts that a card takes; None: all.

    Args:
        gpu_memory: bytes for all weights; "fit": all if the model fits in what is free, else
            as many as leave some free for activations and caches.
        experts: bytes of all experts.
        rest: bytes of the other weights, which all have to be on the card.
        free: bytes of the card's memory.

    Raises:
        InputError: the card does not hold the other weights.
    """
    if gpu_memory == "fit":
        gpu_memory = card_room(free, experts + rest)
    if experts + rest <= gpu_memory:
        return None
    if gpu_memory < rest:
        raise InputError(
            f"The card's memory for weights is {size_text(gpu_memory)}, and those outside the "
            f"experts take {size_text(rest)}. Give at least {rest:,} bytes, or use --device cpu."
        )
    return gpu_memory - rest
