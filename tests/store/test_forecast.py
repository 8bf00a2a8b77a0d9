"""Forecasts: what is expected to be in memory, and the speed that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import SCORES
from moepress.kernels import cpu
from moepress.store import forecast as module
from moepress.store.forecast import Forecast, expected_misses, forecast, read_speed
from moepress.store.uses import frequencies
from tests.test_allocate import make_scores


def test_misses_follow_from_the_most_frequent_experts() -> None:
    frequency = [np.array([0.9, 0.1]), np.array([0.6, 0.4])]
    sizes = [np.array([10.0, 10.0]), np.array([10.0, 10.0])]
    assert expected_misses(frequency, sizes, 20) == pytest.approx(0.25**1.8)
    assert expected_misses(frequency, sizes, 40) == 0
    assert expected_misses(frequency, sizes, 9) == 1
    unknown = [np.zeros(2), np.zeros(2)]
    assert expected_misses(unknown, sizes, 20) == pytest.approx(0.5**1.8)


def test_speed_is_bytes_over_measured_speeds() -> None:
    found = Forecast(100, 10, 50, 0.5, 60, 30, memory_bytes_per_s=600, drive_bytes_per_s=10)
    assert found.tokens_per_s == pytest.approx(1 / (0.1 + 3))
    assert "50%" in str(found) and json.loads(json.dumps(found.to_dict()))["tokens_per_s"]


def test_what_a_forecast_says() -> None:
    reading = Forecast(10**10, 10, 5 * 10**9, 0.5, 60, 30, 600, 10)
    assert "10.0 GB of experts, 5.0 GB in memory: 50% of the chosen" in str(reading)
    whole = Forecast(
        256_000, 10, 10**9, 1.0, 6e5, 0.0, memory_bytes_per_s=2e10, drive_bytes_per_s=9
    )
    assert str(whole) == (
        "256.0 kB of experts, all in memory: nothing is read per token; at most 33,300 tokens/s"
    )


def test_a_drive_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "some"
    file.write_bytes(bytes(3_000_000))
    assert read_speed(file) > 0
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_speed(tmp_path / "none")


@pytest.mark.skipif(cpu.missing() is not None, reason="no kernels")
def test_the_doctor_says_why_there_is_no_forecast(tmp_path: Path) -> None:
    from moepress.doctor import doctor

    with pytest.raises(InputError):
        forecast(tmp_path)
    (check,) = [c for c in doctor(tmp_path).checks if c.name == "speed"]
    assert check.state == "failed" and "safetensors" in check.found
    assert module.memory_speed() > 0


def test_counts_are_found_by_the_number_of_the_layer(tmp_path: Path) -> None:
    scores = make_scores()
    scores.save(tmp_path / SCORES)
    experts = scores.tokens.shape[1]
    names = "model.layers.{}.mlp.experts", "transformer.blocks.{}.ffn.experts"
    for name in names:
        paths = [name.format(number) for number in scores.layers]
        found = frequencies(tmp_path, [*paths, name.format(99)], [experts] * (len(paths) + 1))
        for row, tokens in zip(found, scores.tokens, strict=False):
            np.testing.assert_allclose(row, tokens / scores.total_tokens)
        assert not found[-1].any()
