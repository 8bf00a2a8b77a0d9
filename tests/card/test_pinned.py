"""Pinned memory is taken where there is much more of it; elsewhere work goes on without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moepress import pinned
from moepress.format import checkpoint
from moepress.format.checkpoint import Writer
from moepress.rounding import noise
from tests.card.tensors import Card

SHAPE = (24, 40)


@pytest.mark.parametrize("room", [True, False])
def test_drawn_numbers_are_the_same_without_pinned_memory(
    card: Card, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = pinned.pinned_bytes(4 * SHAPE[0] * SHAPE[1])
    free = size / pinned.SHARE_PINNED
    monkeypatch.setattr(pinned, "free_host_memory", lambda: free + 1 if room else free - 1)
    noise.draw_ahead(SHAPE, 3, "a")
    found = noise.draw(SHAPE, 3, "a")
    assert found.is_pinned() == room and found.shape == SHAPE[::-1]
    assert torch.equal(found, noise.draw(SHAPE, 3, "a"))


@pytest.mark.parametrize("room", [True, False])
def test_tensors_that_memory_has_no_room_for_are_written_at_once(
    card: Card, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.arange(3000.0)  # 16 KB if they are pinned
    free = (1 << 14) / checkpoint.SHARE_PINNED_COPIES
    monkeypatch.setattr(checkpoint, "free_host_memory", lambda: free if room else free - 1)
    writer, path = Writer(torch.device("cuda", 0)), tmp_path / "one.safetensors"
    writer.save({path: {"x": numbers.to("cuda")}})
    assert (writer._begun is not None) == room
    writer.finish()
    assert torch.equal(load_file(path)["x"], numbers)
    assert bool(card.pinned) == room
