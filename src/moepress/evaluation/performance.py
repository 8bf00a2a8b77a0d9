"""How fast a loaded model reads and writes, and how much memory that takes.

Batch 1, greedy, with the cache that `generate` uses by default: what one person at one machine
sees. Prefill is one pass over a prompt; decoding is timed as the difference between writing many
tokens and writing one, so that the prompt counts for nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPEATS = 3  # the median counts
DECODED = 64  # tokens
DECODE_PROMPT = 32  # tokens already there when decoding starts


@dataclass(frozen=True)
class Performance:
    """Speed at batch 1, and the most memory that was in use."""

    prefill_tokens: int  # of the prompt
    prefill_tokens_per_second: float
    decode_tokens: int  # written
    decode_prompt_tokens: int  # that they follow
    decode_tokens_per_second: float
    peak_bytes: int | None  # resident memory, or a GPU's; None: this system does not tell
    device: str
    threads: int


@torch.inference_mode()
def measure_performance(model: Any, prompt: Tensor) -> Performance:
    """Time a model.

    Args:
        model: a causal LM of transformers, loaded.
        prompt: [L] int64 tokens of a text, L at least 2.
    """
    device = model.device
    prompt = prompt.to(device)[None]
    short = prompt[:, :DECODE_PROMPT]

    def prefill() -> None:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def write(tokens: int) -> Callable[[], None]:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        mask = torch.ones_like(short)
        return lambda: model.generate(input_ids=short, attention_mask=mask, **options)

    reading = _seconds(prefill, device)
    writing = _seconds(write(1 + DECODED), device) - _seconds(write(1), device)
    return Performance(
        prefill_tokens=prompt.shape[1],
        prefill_tokens_per_second=prompt.shape[1] / reading,
        decode_tokens=DECODED,
        decode_prompt_tokens=short.shape[1],
        decode_tokens_per_second=DECODED / max(writing, 1e-9),
        peak_bytes=peak_bytes(device),
        device=str(device),
        threads=torch.get_num_threads(),
    )


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median time of a few runs after one that does not count."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def forget_peak(device: torch.device) -> None:
    """Start to measure `peak_bytes` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, man 5 proc
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most memory in use since `forget_peak`: of this process, or allocated on its GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
