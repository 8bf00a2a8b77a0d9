"""Measure the speed of a loaded model in prefill and decode, and its peak memory.

Batch 1, greedy, with the default cache of `generate`: what a single user sees. Prefill is one
forward pass over a prompt. Decoding is timed as the difference between generating many tokens and
generating one, so that the prompt does not count.
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

from moepress.generation import following

REPEATS = 3  # runs, of which the median is taken
DECODED = 64  # tokens to time
DECODE_PROMPT = 32  # tokens of the prompt when decoding


@dataclass(frozen=True)
class Performance:
    """Speed at batch 1, and peak memory."""

    prefill_tokens: int  # tokens of the prompt
    prefill_tokens_per_second: float
    decode_tokens: int  # generated tokens
    decode_prompt_tokens: int  # tokens of their prompt
    decode_tokens_per_second: float
    peak_bytes: int | None  # resident memory, or GPU memory; None: unknown on this system
    device: str
    threads: int


@torch.inference_mode()
def measure_performance(model: Any, prompt: Tensor) -> Performance:
    """Time a model, and read the peak memory since `forget_peak`.

    Args:
        model: a loaded causal LM of transformers.
        prompt: [L] int64 tokens, L at least 2.
    """
    device = model.device
    prompt = prompt.to(device)[None]
    short = prompt[:, :DECODE_PROMPT]

    def prefill() -> None:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def decode(tokens: int) -> Callable[[], None]:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        mask = torch.ones_like(short)
        return lambda: model.generate(input_ids=short, attention_mask=mask, **options)

    with following(model):
        prefill_seconds = _seconds(prefill, device)
        decode_seconds = _seconds(decode(1 + DECODED), device) - _seconds(decode(1), device)
    return Performance(
        prefill_tokens=prompt.shape[1],
        prefill_tokens_per_second=prompt.shape[1] / prefill_seconds,
        decode_tokens=DECODED,
        decode_prompt_tokens=short.shape[1],
        decode_tokens_per_second=DECODED / max(decode_seconds, 1e-9),
        peak_bytes=peak_bytes(device),
        device=str(device),
        threads=torch.get_num_threads(),
    )


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median time of `REPEATS` runs, after a warm-up run."""

    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    timed()
    return statistics.median(timed() for _ in range(REPEATS))


def forget_peak(device: torch.device) -> None:
    """Reset `peak_bytes`, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, man 5 proc
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory in bytes since `forget_peak`: resident memory of this process, or GPU memory that
    torch allocated. None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
