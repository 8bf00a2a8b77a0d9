"""Bytes are shown in a unit that leaves a number to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepress.byte_units import size_text
from moepress.errors import InputError
from moepress.kernels.cpu.expert_store import StoreCounts
from moepress.original.arriving import what_to_do
from moepress.store.forecast import CardFit, Forecast
from moepress.store.memory import card_budget, plan
from moepress.store.statistics import Statistics


def test_units() -> None:
    sizes = (0, 340, 1000, 1_480_000, 999_940_000, 15.1e9, 2e15)
    assert [*map(size_text, sizes)] == [
        "0 bytes", "340 bytes", "1.0 kB", "1.5 MB", "999.9 MB", "15.1 GB", "2000.0 TB",
    ]  # fmt: skip


def test_small_models_have_sizes_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is 1\.0 kB.* take 1\.5 MB. Give more than 1,480,000"):
        plan(1000, 800, 1_480_000)
    with pytest.raises(InputError, match=r"is 1\.0 kB.* take 1\.5 MB. Give at least 1,480,000"):
        card_budget(1000, 800, 1_480_000, 0)
    slow = Forecast(1_100_000, 10, 50_000, 0.1, 4e5, 3e5, 2e10, 400e6)
    assert "300.0 kB read per token at 400.0 MB/s" in str(slow)
    assert "1.1 MB of weights do not fit into 500 bytes" in str(CardFit(500, 10**6, 10**5, 0, None))
    counts = StoreCounts(**dict.fromkeys(StoreCounts.__dataclass_fields__, 10))
    assert str(Statistics(counts)).endswith("1 bytes read per token")
    unfinished = tmp_path / ".cache" / "huggingface" / "download" / "abc.def.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(bytes(2000))
    assert "2.0 kB so far" in what_to_do(tmp_path)
