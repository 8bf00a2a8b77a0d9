"""The device under test: how to time work on it, and its ceilings.

`Card("cpu")` has no graphs and a clock of its own, so that every script of this folder also runs
without a card.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from on_gpu.case import Row

COPY_BYTES = 2 << 30
POISON_BYTES = 64 << 20


class Card:
    """A device.

    Args:
        device: "cuda" or "cpu".
        tiny: whether shapes shall be small: to prove a script without a card.
    """

    def __init__(self, device: str, tiny: bool = False) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self.tiny = tiny

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)

    @property
    def memory(self) -> int:
        """Bytes that are free, those that torch keeps for reuse included."""
        if not self.is_cuda:
            return 8 << 30
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    def release(self) -> None:
        """Return cached memory to the driver."""
        import gc

        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def poison(self) -> None:
        """Fill memory that the next `torch.empty` will get with NaN."""
        sizes = (1 << 10, 64 << 10, 1 << 20, *(() if self.tiny else (16 << 20, POISON_BYTES)))
        count = 1 if self.tiny else 2
        held = [
            torch.full((n,), 255, dtype=torch.uint8, device=self.device)
            for n in sizes
            for _ in range(count)
        ]
        del held

    def captured(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that repeats `work` as one CUDA graph, and what `work` returned.

        Without a card: a function that calls `work`.
        """
        if not self.is_cuda:
            return (lambda: void(work())), work()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph.replay, result

    def seconds(self, work: Callable[[], Any], at_least: float = 0.03, rounds: int = 5) -> float:
        """Median time of one call of `work`, which only queues work on the device.

        A round repeats it until `at_least` seconds have passed.
        """
        work()
        once = self._clock(work, 1)
        repeats = 1 if self.tiny else min(2000, max(1, int(at_least / max(once, 1e-6))))
        return statistics.median(self._clock(work, repeats) for _ in range(rounds))

    def _clock(self, work: Callable[[], Any], repeats: int) -> float:
        self.synchronize()
        if not self.is_cuda:
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - started) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    def profiled(self, work: Callable[[], Any], repeats: int = 3) -> list[Row]:
        """The kernels that `work` runs: calls and microseconds of each, longest first.

        Empty without a card, or if the profiler does not work here.
        """
        if not self.is_cuda:
            return []
        from torch.profiler import ProfilerActivity, profile

        work()
        self.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as measured:
                for _ in range(repeats):
                    work()
                self.synchronize()
        except Exception as error:  # figures of the profiler are a bonus
            return [{"kernel": f"profiler: {error}"[:200], "calls": 0.0, "us": 0.0}]
        rows = [
            {
                "kernel": event.key[:60],
                "calls": event.count / repeats,
                "us": event.self_device_time_total / repeats,
            }
            for event in measured.key_averages()
            if event.self_device_time_total > 0
        ]
        return sorted(rows, key=lambda row: -row["us"])[:14]

    def copy_rate(self) -> float:
        """Bytes read and written per second by a large copy on the device."""
        size = (32 << 20) if self.tiny else COPY_BYTES
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    def read_rate(self) -> float:
        """Bytes per second that a large sum reads: kernels of packed weights hardly write."""
        size = (32 << 20) if self.tiny else COPY_BYTES
        source = torch.ones(size // 4, dtype=torch.float32, device=self.device)
        return size / self.seconds(lambda: source.sum())

    def product_rate(self) -> float:
        """Operations per second of a bfloat16 matrix product on random data."""
        n = 256 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b)


def void(_: Any) -> None:
    """Forget a result."""
