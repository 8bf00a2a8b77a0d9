"""While the experts of a layer run on a card, those of the next layer are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.costs.sensitivity import measure_sensitivity
from moepress.errors import FileError
from moepress.original import resident
from moepress.original.resident import ComingExperts
from moepress.original.source import Source
from tests.card.tensors import Card
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
        begun.extend(coming._begun)

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
