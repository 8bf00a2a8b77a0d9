"""The memory that commands plan for and tell is what a container leaves to the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moepress import memory
from moepress.doctor import doctor
from moepress.estimate import estimate
from moepress.evaluate import evaluate
from moepress.hf.files import read_ahead
from moepress.original.read_ahead import ReadAhead
from moepress.propose import memory as of_proposals
from tests.conftest import small_recipe

LIMIT, LEFT = 500_000, 300_000  # bytes; tiny models take more

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_groups", lambda: iter([(2**62, 2**61), (LIMIT, LEFT)]))


def test_limits() -> None:
    assert (memory.host_memory(), memory.free_host_memory()) == (LIMIT, LEFT)


def test_proposals_and_estimates(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    assert of_proposals()["RAM"] == LIMIT
    found = estimate(model_folder(), tmp_path / "out", small_recipe(text_file, bits=2))
    assert found.free_memory_bytes == LEFT
    (check,) = (check for check in doctor().checks if check.name == "memory")
    assert check.found == "500.0 kB, 300.0 kB available"


def test_originals_that_do_not_fit_are_not_loaded(
    model_folder: Folder, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"length": 32, "limit": 1, "generations": 2}
    result = evaluate(model_folder(), [str(text_file)], **options)  # type: ignore[arg-type]
    assert result.repetition is None and "300,000 are free: skipping" in caplog.text


def test_files_are_read_ahead_into_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(LEFT))
    assert read_ahead([str(tmp_path / "weights")]) is None
    assert ReadAhead([], "nothing")._window < LEFT
