"""Capture what the host queues on a card as a CUDA graph: one launch in place of thousands.

A graph repeats kernels with the addresses they had when it was captured, and nothing of what Python
did. So the work must not wait for the card, and everything that changes must be read from memory on
the card.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class Graph:
    """Captured work.

    Attributes:
        result: what the work returned; every replay writes to it.
        replay: queues the work on torch's current stream.
    """

    result: Tensor
    replay: Callable[[], object]


def cuda_graph(work: Callable[[], Tensor], device: torch.device) -> Graph:
    """Capture `work`, which runs twice before: to load kernels, and to see whether it waits.

    Raises:
        RuntimeError: it waits for the card, or does something else that a graph cannot contain.
            Afterwards the card can be used as before.
    """
    current, stream = torch.cuda.current_stream(device), _stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            work()
            with _waits_raise():  # inside a capture they would leave torch's allocator in disorder
                work()
            torch.cuda.synchronize(device)
            return _recorded(work, stream.device)
    finally:
        current.wait_stream(stream)


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs are captured: cuBLAS keeps memory for every stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _recorded(work: Callable[[], Tensor], device: torch.device) -> Graph:
    """Capture `work` on the current stream, which must not be the default one."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # "thread_local": what other threads do on the card does not disturb.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = work()
    except BaseException:
        with suppress(RuntimeError):  # the first error says more
            _end(graph, pool, device)
        raise
    _end(graph, pool, device)
    return Graph(result, graph.replay)


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """End a capture. Where it is invalid torch raises before it tells its allocator and others."""
    try:
        graph.capture_end()
    except BaseException:
        for tell in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with suppress(RuntimeError, AttributeError):
                getattr(torch._C, tell)(device.index, pool)
        with suppress(RuntimeError):
            _capture_nothing(device)
        raise


def _capture_nothing(device: torch.device) -> None:
    """A capture that ends well: it tells torch's random numbers, too, that there is none.

    After one that did not, they refuse every draw on the device ("Offset increment outside graph
    capture").
    """
    numbers, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        numbers.zero_()
    finally:
        graph.capture_end()


class numbers_made_there(TorchFunctionMode):  # noqa: N801  # a context manager
    """Inside the `with` statement, `torch.tensor(number, device=card)` fills memory on the card.

    torch copies the number from the host, and waits. transformers before 5.24 makes masks of
    "eager" attention with it, gpt-oss's for one.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if (
            func in (torch.tensor, torch.as_tensor)
            and len(args) == 1
            and isinstance(args[0], bool | int | float)
            and given.get("device") is not None
            and given.keys() <= {"device", "dtype"}
        ):
            return torch.full((), args[0], **given)
        return func(*args, **given)


@contextmanager
def _waits_raise() -> Iterator[None]:
    """Inside the `with` statement, what makes the host wait for a card raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
