"""The demo keeps a folder that can be reported on, and prints nothing of its libraries."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import moepress as mp
from moepress.format.checkpoint import EVALUATION, load_json

compress_module = importlib.import_module("moepress.compress")
demo_module = importlib.import_module("moepress.demo")
report_module = importlib.import_module("moepress.report")


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with less text and the fast recipe: seconds instead of a minute."""
    compress = compress_module.compress

    def faster(model: Path, out: Path, **options: Any) -> Path:
        less = {"sequences": 4, "sequence_length": 64, "token_floor": 1}
        return Path(compress(model, out, "fast", **{**options, **less}))

    monkeypatch.setattr(compress_module, "compress", faster)
    monkeypatch.setattr(demo_module, "WINDOWS", 2)


@pytest.mark.usefixtures("small_demo")
def test_the_kept_folder_has_its_evaluation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    _, compressed = mp.demo(out)["models"]
    printed = capfd.readouterr()
    assert printed.out == "" and "Loading weights" not in printed.err
    kept = load_json(out / EVALUATION)
    assert kept["kind"] == "evaluation" and kept["folder_bytes"] == compressed["folder_bytes"]
    assert kept["texts"][0]["perplexity"] == compressed["perplexity"]
    assert report_module.read_subject(out).evaluation == kept  # else the page warns
    assert f"{compressed['perplexity']:.4g}" in mp.report(out).read_text()
    assert mp.inspect(out)["folder_bytes"] == compressed["folder_bytes"]
