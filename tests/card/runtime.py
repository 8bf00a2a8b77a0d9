"""`torch.cuda` and the launcher of kernels, as a machine with the pretended card has them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.kernels import cpu
from moepress.kernels.backends import _choose
from moepress.kernels.cuda import launch as launching
from moepress.kernels.cuda import search
from tests.card import functions, tensors
from tests.card.tensors import DEVICE, Card, CardError, CardTensor
from tests.kernels.cuda import emulate

MULTIPROCESSORS = 8
SEARCH = "moepress_viterbi_search"


class Stream:
    """A stream. Work on it is done at once; copies wait for a synchronisation."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, device: Any = None, **_: Any) -> None:
        functions._device(0 if device is None else device)

    def synchronize(self) -> None:
        tensors.card.wait("stream")

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def query(self) -> bool:
        return True


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        tensors.card.wait("event")


class Generator(torch._C.Generator):
    """Random numbers. Those of the card are the CPU's."""

    where: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.where = functions._device(device)
        return made


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _free(device: Any = None) -> tuple[int, int]:
    return tensors.card.total - tensors.card.allocated, tensors.card.total


def _reset_peak(device: Any = None) -> None:
    tensors.card.peak = tensors.card.allocated


def _launch(
    kernel: str, grid: tuple[int, int, int], threads: int, shared: int, args: Sequence[Any]
) -> None:
    """Run a kernel in the emulator. All tensors are on the card."""
    for arg in args:
        if isinstance(arg, Tensor) and not isinstance(arg, CardTensor):
            raise CardError(f"{kernel} gets a tensor of the {arg.device}: {tuple(arg.shape)}")
    inside = [a.inner if isinstance(a, CardTensor) else a for a in args]
    if kernel == SEARCH and cpu.missing() is None:
        _search(*inside)
        return
    emulate.launch(kernel, grid, threads, shared, inside)


def _search(
    target: Tensor,
    feedback: Tensor | None,
    branches: Tensor,
    widths: Tensor,
    count: int,
    columns: int,
    rows: int,
    first: int,
    scratch: Tensor,
) -> None:
    """The kernel SEARCH by the library of the CPU: the emulator would take minutes."""
    some = slice(first, first + 8)
    for number, width in enumerate(widths.tolist()):
        wanted = target[number, some]
        if feedback is None:
            branches[number, some] = cpu.trellis_search(wanted, width / 2)
        else:
            one = feedback[number, some], branches[number, some], width / 2
            cpu.trellis_round(wanted.clone(), *one)


_PROPERTIES = SimpleNamespace(
    name="Pretended card",
    multi_processor_count=MULTIPROCESSORS,
    major=9,
    minor=0,
    total_memory=Card().total,
)
RUNTIME: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": _nothing,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "Pretended card",
    "get_device_properties": lambda device=None: _PROPERTIES,
    "is_bf16_supported": lambda *_: True,
    "synchronize": lambda device=None: tensors.card.wait("synchronize"),
    "mem_get_info": _free,
    "memory_allocated": lambda device=None: tensors.card.allocated,
    "memory_reserved": lambda device=None: tensors.card.allocated,
    "max_memory_allocated": lambda device=None: tensors.card.peak,
    "max_memory_reserved": lambda device=None: tensors.card.peak,
    "reset_peak_memory_stats": _reset_peak,
    "get_per_process_memory_fraction": lambda device=None: 1.0,
    "empty_cache": lambda: None,
    "Stream": Stream,
    "Event": Event,
    "stream": _nothing,
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "is_current_stream_capturing": lambda: False,
}
ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "current_device_index": lambda: 0,
    "synchronize": lambda device=None: tensors.card.wait("synchronize"),
    "empty_cache": lambda: None,
}


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Iterator[Card]:
    """Inside the `with` statement, the machine has a card, whose state is returned."""
    card = Card(**changes)
    for module in (tensors, functions):
        monkeypatch.setattr(module, "card", card)
    for name, value in RUNTIME.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in ACCELERATOR.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(launching, "_driver", lambda: None)
    monkeypatch.setattr(launching.compiler, "architecture", lambda capability: "sm_90")
    launcher = launching.Launcher(_launch, MULTIPROCESSORS)
    monkeypatch.setitem(launching.LAUNCHERS, "cuda", lambda device: launcher)
    monkeypatch.setattr(threading.Thread, "run", functions.run_thread)
    caches = (_choose, search.available, search._widths)
    for cache in caches:
        cache.cache_clear()
    try:
        with functions.Functions():
            yield card
    finally:
        for cache in caches:
            cache.cache_clear()
