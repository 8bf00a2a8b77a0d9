"""Measured speeds of a model and a clock with known speeds."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from moepress.evaluation import performance
from moepress.evaluation.performance import (
    DECODE_PROMPT,
    DECODED,
    forget_peak,
    measure_performance,
    peak_bytes,
)


class Clock:
    """A model that is its own clock: time passes only while it works."""

    device = torch.device("cpu")
    generation_config = GenerationConfig()

    def __init__(self) -> None:
        self.now = 0.0
        self.warm = False

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> None:
        self.now += 0.01 * input_ids.shape[1] + (0.0 if self.warm else 100.0)
        self.warm = True

    def generate(
        self, input_ids: torch.Tensor, min_new_tokens: int, max_new_tokens: int, **options: Any
    ) -> None:
        assert min_new_tokens == max_new_tokens  # stopping early would make it look slow
        self.now += 3.0 + 0.25 * max_new_tokens


def test_rates_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(performance, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = measure_performance(clock, torch.zeros(200, dtype=torch.long))
    assert found.prefill_tokens == 200
    assert found.prefill_tokens_per_second == pytest.approx(100)
    assert found.decode_tokens_per_second == pytest.approx(4)  # without the prompt's 3 seconds
    assert (found.decode_tokens, found.decode_prompt_tokens) == (DECODED, DECODE_PROMPT)
    assert found.threads == torch.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_since_the_last_reset() -> None:
    cpu = torch.device("cpu")
    big = torch.ones(100_000_000, dtype=torch.uint8)
    with_it = peak_bytes(cpu)
    del big
    forget_peak(cpu)
    without = peak_bytes(cpu)
    assert with_it is not None and without is not None
    assert with_it - without > 80_000_000
    another = torch.ones(100_000_000, dtype=torch.uint8)
    del another
    after = peak_bytes(cpu)
    assert after is not None and after - without > 80_000_000
