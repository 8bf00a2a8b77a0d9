"""While the experts of a layer run on a card, those of the next layer are read."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.costs.sensitivity import measure_sensitivity
from moepress.errors import FileError
from moepress.original import resident
from moepress.original.resident import ComingExperts
from moepress.original.source import Source
from moepress.original.walk import Walk
from tests.card.tensors import Card, CardTensor
from tests.families.models import make_model, save_model
from tests.original.test_walk import some_ids

LAYERS = 3


@pytest.fixture
def folder(tmp_path: Path, card: Card) -> Path:
    return save_model(make_model("mixtral", num_hidden_layers=LAYERS), tmp_path / "source")


def measured(folder: Path, to: Path) -> list[dict[str, Tensor]]:
    found = measure_sensitivity(Source(folder, "cuda"), some_ids(2, 8), to, {}, 0)
    return [dict(found.layer(layer)) for layer in range(LAYERS)]


def test_the_next_layer_is_read_ahead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measured(folder, tmp_path / "ahead")
    begun: list[int] = []
    begin = ComingExperts.begin

    def counted(coming: ComingExperts, source: Source, layer: int | None) -> None:
        begin(coming, source, layer)
        if coming._begun is not None:
            begun.append(coming._begun.layer)

    monkeypatch.setattr(ComingExperts, "begin", counted)
    again = measured(folder, tmp_path / "counted")
    assert begun == [1, 2, 1, 0]  # forward, then back from the last layer, which was read last
    monkeypatch.setattr(resident, "SHARE_AHEAD", 0.0)
    alone = measured(folder, tmp_path / "not ahead")
    assert begun == [1, 2, 1, 0]
    for found in (again, alone):
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_read_ahead_is_an_error_of_its_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = Source.expert

    def fails(source: Source, layer: int, index: int) -> Any:
        if layer == 2:
            raise FileError("this one is damaged")
        return expert(source, layer, index)

    monkeypatch.setattr(Source, "expert", fails)
    with pytest.raises(FileError, match="damaged"):
        measured(folder, tmp_path / "work")


def test_at_most_one_layer_waits(folder: Path, card: Card) -> None:
    """A walk may skip the layer that was begun."""
    source = Source(folder, "cuda")
    walk = Walk(source, some_ids(2, 8))
    coming, modules = ComingExperts(), [walk.experts_module(layer) for layer in range(LAYERS)]
    before = card.allocated
    one = coming.take(source, 0, modules[0])
    size = card.allocated - before
    assert one is not None and size > 0
    coming.begin(source, 1)
    coming.begin(source, 2)
    coming.take(source, 0, modules[0])  # read, and let go
    assert coming._begun is None
    assert card.allocated == before + size
    coming.begin(source, 1)
    coming.begin(source, None)
    assert coming._begun is None
    assert card.allocated == before + size


def test_a_card_that_is_full_while_a_layer_runs(
    folder: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts are read again after the layer, when nothing is left of the first attempt."""
    expected = measured(folder, tmp_path / "whole")
    expert, again = Source.expert, resident.resident_experts
    failed: list[int] = []
    allocated: list[int] = []

    def fails(source: Source, layer: int, index: int) -> Any:
        if layer == 1 and index == 2 and not failed:
            failed.append(layer)
            raise torch.OutOfMemoryError("full")
        return expert(source, layer, index)

    def counted(source: Source, layer: int, module: Any) -> Any:
        allocated.append(card.allocated)
        return again(source, layer, module)

    monkeypatch.setattr(Source, "expert", fails)
    monkeypatch.setattr(resident, "resident_experts", counted)
    for one, other in zip(measured(folder, tmp_path / "full"), expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert failed == [1]

    source, coming = Source(folder, "cuda"), ComingExperts()
    module = Walk(source, some_ids(2, 8)).experts_module(1)
    failed.clear()
    allocated[:] = [card.allocated]
    coming.begin(source, 1)
    found = coming.take(source, 1, module)
    assert failed == [1] and found is not None
    assert allocated == [allocated[0]] * 2


def test_memory_is_kept_for_the_stream_of_the_thread_that_uses_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has a current stream of its own."""
    seen: dict[int, list[str]] = {}

    def current(device: Any = None) -> Any:
        return SimpleNamespace(thread=threading.current_thread().name)

    def record(tensor: CardTensor, stream: Any) -> None:
        seen.setdefault(id(tensor), []).append(stream.thread)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(CardTensor, "record_stream", record)
    source = Source(folder, "cuda")
    module = Walk(source, some_ids(2, 8)).experts_module(0)
    coming = ComingExperts()
    here = threading.current_thread().name
    for ahead in (False, True):
        if ahead:
            coming.begin(source, 0)
            assert coming._begun is not None
        found = coming.take(source, 0, module)
        assert found is not None
        tensors = [v for one in found.weights for v in one or () if v is not None]
        assert len(tensors) > 4
        assert [seen.pop(id(tensor)) for tensor in tensors] == [[here]] * len(tensors)
