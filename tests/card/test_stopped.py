"""A card leaves states and gradients on disk once a minute; stopped runs repeat what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.costs import kept_states
from moepress.costs.kept_states import KeptStates
from moepress.costs.sensitivity import check_space, measure_sensitivity
from moepress.errors import CheckpointError
from moepress.original import batches
from moepress.original.resident import ComingExperts
from moepress.original.source import Source
from moepress.original.walk import Walk
from tests.card.tensors import Card
from tests.families.models import make_model, save_model
from tests.original.test_walk import some_ids

sensitivity = importlib.import_module("moepress.costs.sensitivity")
LAYERS = 4


class Stopped(BaseException):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(make_model("mixtral", num_hidden_layers=LAYERS), tmp_path / "source")


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, bytes]]]:
    """Measures in a folder, stopped before one of its writes; returns what is left there."""

    def measure(name: str, every: float, dies_at: int = 0) -> dict[str, bytes]:
        clock = SimpleNamespace(monotonic=count().__next__)  # each look takes a second
        writes = count(1)
        real = importlib.import_module("moepress.format.unfinished").save_unfinished

        def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
            if next(writes) == dies_at:
                raise Stopped
            real(path, tensors)

        with monkeypatch.context() as patch:
            for module in (kept_states, sensitivity):
                patch.setattr(module, "time", clock)
                patch.setattr(module, "STATES_EVERY", every)
                patch.setattr(module, "save_unfinished", save)
            try:
                measure_sensitivity(Source(folder, "cuda"), some_ids(2, 8), tmp_path / name, {}, 0)
            except Stopped:
                assert dies_at
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    yield measure
    assert not card.copies


def test_a_card_writes_few_states(
    run: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    often = run("often", 0.0)
    read: list[Path] = []
    monkeypatch.setattr(kept_states, "load_unfinished", read.append)
    rarely = run("rarely", 1e9)
    assert often == rarely and len(often) == 1 + LAYERS
    assert not read


@pytest.mark.card
@pytest.mark.parametrize("every", [0.0, 3.0, 1e9])
def test_a_stopped_run_on_a_card_ends_with_the_same_bytes(
    run: Callable[..., dict[str, bytes]], every: float
) -> None:
    whole = run("whole", every)
    for dies_at in range(1, 20):
        name = f"stopped at {dies_at}"
        left = run(name, every, dies_at)
        if left == whole:
            break
        assert run(name, every) == whole
    assert 5 < dies_at < 19


def test_states_that_have_no_room_are_files(
    run: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole", 1e9)
    kept: list[int] = []
    keep = KeptStates.keep

    def counted(states: KeptStates, layer: int, tensors: Mapping[str, Tensor]) -> None:
        keep(states, layer, tensors)
        states.finish()
        kept.append(layer)
        assert states.on_disk(layer) and not states._held

    monkeypatch.setattr(KeptStates, "keep", counted)
    monkeypatch.setattr(kept_states, "SHARE_HELD", 0.0)
    assert run("no room", 1e9) == whole
    assert kept == list(range(LAYERS + 1))


def test_experts_of_layers_that_are_skipped_are_not_read(
    run: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run goes past layers whose states are a file."""
    begun: list[int] = []
    taken: list[int] = []
    begin, take = ComingExperts.begin, ComingExperts.take

    def begins(coming: ComingExperts, source: Source, layer: int | None) -> None:
        begin(coming, source, layer)
        if coming._begun is not None:
            begun.append(coming._begun.layer)

    def takes(coming: ComingExperts, source: Source, layer: int, module: Any) -> Any:
        if coming._begun is not None:
            taken.append(layer)
        return take(coming, source, layer, module)

    run("stopped", 2.0, dies_at=3)
    monkeypatch.setattr(ComingExperts, "begin", begins)
    monkeypatch.setattr(ComingExperts, "take", takes)
    run("stopped", 2.0)
    assert begun == taken == [3, 2, 1, 0]


@pytest.mark.parametrize("left", ["nothing", "a gradient"])
def test_the_disk_must_have_room_for_states_that_memory_held(
    left: str,
    run: Callable[..., dict[str, bytes]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "stopped").mkdir()
    need = LAYERS + 1 + 2  # the states before and after every layer, and two gradients
    if left == "a gradient":
        files = run("stopped", 1e9, dies_at=3)
        assert files.keys() - {"identity.json"} == {
            f"gradient-{LAYERS:04d}.safetensors",
            f"sensitivity-{LAYERS - 1:04d}.safetensors",
        }
        need -= 2
    walk = Walk(Source(folder, "cuda"), some_ids(2, 8))
    one = walk.states.nbytes
    free = [need * one]
    monkeypatch.setattr(sensitivity.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    check_space(tmp_path / "stopped", walk, LAYERS - 1)
    free[0] -= 1
    with pytest.raises(CheckpointError, match=f"need about {need * one:,} bytes more .should mem"):
        check_space(tmp_path / "stopped", walk, LAYERS - 1)


def test_states_that_cannot_be_pinned_are_not_copied(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_file(file: Any, size: int) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(batches, "IN_MEMORY", 1024)
    monkeypatch.setattr(batches, "_reserve", no_file)
    states = KeptStates(tmp_path, torch.device("cuda", 0), 4)
    held = torch.arange(512, dtype=torch.float32)
    states.keep(1, {"states": held.cuda()})
    for memory, pinned in ((17 * 1024, False), (1 << 30, True)):
        monkeypatch.setattr("moepress.pinned.free_host_memory", lambda m=memory: m)
        states.expect(1)
        found = states.tensors(1)["states"]
        assert torch.equal(found, held)
        assert found.is_pinned() == pinned
    assert not list(tmp_path.iterdir())
