"""The estimate before the work: nothing is written, what can be checked is, and sizes are right."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moepress
from moepress.allocation.plan import BitAllocation
from moepress.byte_units import size_text
from moepress.cli.tables import estimate_table
from moepress.compress import compress
from moepress.errors import BudgetError, CheckpointError, InputError
from moepress.estimate import Estimate, duration, estimate, shares_left
from moepress.format import checkpoint
from moepress.format.checkpoint import PLAN, folder_bytes, write_atomically
from moepress.propose import propose
from moepress.workload import rates
from tests.conftest import small_recipe

Folder = Callable[..., Path]
NAMES = ("sensitivity", "score", "quantize")


@pytest.mark.parametrize(
    ("recipe", "budget"), [("fast", {"bits": 2.5}), ("default", {"size": 300_000})]
)
def test_disk_is_what_is_written(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    budget: dict[str, float],
) -> None:
    """The size of the folder, and the most that lay on disk while it was made."""
    wanted = small_recipe(text_file, recipe, **budget)
    out = tmp_path / "out"
    expected = estimate(model_folder(), out, wanted)
    assert not out.exists()
    most = 0

    def measured(path: Path, write: Callable[[Path], None]) -> None:
        nonlocal most
        write_atomically(path, write)
        most = max(most, sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))

    monkeypatch.setattr(checkpoint, "write_atomically", measured)
    compress(model_folder(), out, wanted)
    assert expected.folder_bytes == pytest.approx(folder_bytes(out), rel=0.03)
    assert 0.9 * most < expected.disk_bytes < 1.3 * most


def test_memory_is_an_upper_bound(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of the compression."""
    code = f"""
import json
from moepress.compress import compress
from moepress.estimate import estimate
from tests.conftest import small_recipe
recipe = small_recipe({str(text_file)!r}, "default", bits=2.5)
expected = estimate({str(model_folder())!r}, {str(tmp_path / "out")!r}, recipe)
compress({str(model_folder())!r}, {str(tmp_path / "out")!r}, recipe)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([expected.memory_bytes, 1024 * int(peak.split()[1])]))
"""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak is read from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected, peak = json.loads(done.stdout)
    assert peak < expected < 3 * peak


@pytest.fixture(scope="module")
def found(
    model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Estimate:
    folder = tmp_path_factory.mktemp("estimate") / "out"
    return estimate(model_folder(), folder, small_recipe(text_file, "default", bits=2.5))


def test_stages_add_up(found: Estimate) -> None:
    assert tuple(stage.name for stage in found.stages) == NAMES
    assert found.seconds == sum(stage.seconds for stage in found.stages) > 0
    assert found.memory_bytes == max(stage.memory_bytes for stage in found.stages)
    assert found.tokens == found.scored_tokens == 6 * 32


def test_to_dict_and_line(found: Estimate) -> None:
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields["kind"] == "estimate" and fields["folder_bytes"] == found.folder_bytes
    assert [stage["name"] for stage in fields["stages"]] == list(NAMES)
    assert all(f"{name} " in found.line() for name in (*NAMES, "peak memory", "disk"))


def test_the_table_says_how_many_tokens_are_scored(found: Estimate) -> None:
    assert "192 calibration tokens, 2 threads" in estimate_table(found.to_dict() | {"threads": 2})
    some = found.to_dict() | {"scored_tokens": 96, "threads": 2}
    assert "192 calibration tokens, costs measured on 96, 2 threads" in estimate_table(some)


def test_without_a_budget_nothing_is_quantized(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    expected = estimate(model_folder(), tmp_path / "out", small_recipe(text_file, "fast"))
    assert [stage.name for stage in expected.stages] == ["score"]
    assert expected.folder_bytes is None


def test_a_slow_disk_is_told(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate, told in ((5e6, True), (5e13, False)):
        monkeypatch.setattr(rates, "_reading", lambda files, r=rate: (1 / r, 1 / r))
        found = estimate(model_folder(), tmp_path / "out", small_recipe(text_file, bits=2.5))
        assert 0 < found.reading_seconds < found.seconds
        for text in (found.line(), estimate_table(found.to_dict())):
            assert ("of the time is for reading, at 5.0 MB/s" in text) == told


def test_text_of_the_model_itself_is_not_written(
    model_folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    recipe = small_recipe(text_file, "fast", bits=2.5, calib=(("self", 1.0),))
    expected = estimate(model_folder(), tmp_path / "out", recipe)
    assert [stage.name for stage in expected.stages] == ["sample", "score", "quantize"]
    missing = recipe.with_changes(calib=(("self", 1.0), (str(tmp_path / "none.txt"), 1.0)))
    with pytest.raises(InputError, match=r"none\.txt"):
        estimate(model_folder(), tmp_path / "out", missing)


def test_what_compress_would_refuse_is_refused(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = small_recipe(text_file, "fast", bits=2.5), tmp_path / "out"
    with pytest.raises(BudgetError, match="is impossible"):
        estimate(model_folder(), out, recipe, bits=0.5)
    with pytest.raises(InputError):
        estimate(model_folder(), out, recipe, calib=((str(tmp_path / "none.txt"), 1.0),))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="not made by moepress"):
        estimate(model_folder(), tmp_path / "other", recipe)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match="No space left"):
        estimate(model_folder(), out, recipe)
    assert not out.exists()


def test_a_continued_run_has_less_left(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, out = small_recipe(text_file, "fast", bits=2.5), tmp_path / "out"
    assert set(shares_left(out, 2, recipe).values()) == {1.0}
    quantize = importlib.import_module("moepress.quantize")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        round_layer = quantize.quantize_layer
        patch.setattr(
            quantize,
            "quantize_layer",
            lambda walk, layer, *rest: round_layer(walk, layer, *rest) if layer == 0 else 1 / 0,
        )
        compress(model_folder(), out, recipe)
    assert "estimate: about" in capsys.readouterr().err
    left = {stage.name: stage.left for stage in estimate(model_folder(), out, recipe).stages}
    assert left == {"score": 0, "quantize": 0.5}
    expected = estimate(model_folder(), out, recipe)  # what is written already needs no more room
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    room = shutil.disk_usage(tmp_path)._replace(free=expected.disk_bytes - written)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    estimate(model_folder(), out, recipe)
    room = room._replace(free=room.free - 1)
    with pytest.raises(CheckpointError, match=f"No space left.*has written {written:,}"):
        estimate(model_folder(), out, recipe)
    with pytest.raises(InputError, match="differ"):
        estimate(model_folder(), out, recipe, seed=7)
    monkeypatch.undo()
    shutil.rmtree(out / ".moepress" / "quantize")  # to start over: then all layers are rounded
    found = estimate(model_folder(), out, recipe, bits=2).stages
    assert {stage.name: stage.left for stage in found} == {"score": 0, "quantize": 1}


@pytest.mark.parametrize("calib", ["self", "text", "both"])
def test_nothing_is_left_of_a_finished_folder(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calib: str,
) -> None:
    """Text that the model wrote in part is written again, to compare it."""
    texts = {"self": ("self",), "text": (text_file,), "both": ("self", text_file)}[calib]
    pairs = tuple((str(text), 1.0) for text in texts)
    recipe, out = small_recipe(text_file, "fast", bits=2.5, calib=pairs), tmp_path / "out"
    compress(model_folder(), out, recipe)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    for wanted in (recipe, recipe.with_changes(bits=None)):  # without a budget: scores do
        expected = estimate(model_folder(), out, wanted)
        left = {stage.name: stage.left for stage in expected.stages}
        assert left.pop("sample", 0) == (calib == "both") and not any(left.values())
        told = "Nothing is left to do" in estimate_table(expected.to_dict())
        assert told == (calib != "both") == (not expected.seconds) == (not expected.memory_bytes)
    with pytest.raises(InputError, match="finished model of other work"):
        estimate(model_folder(), out, recipe, bits=2)


def test_scores_in_the_folder_tell_its_size(
    model_folder: Folder, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Costs that are assumed give a folder of 15 % less here."""
    recipe, out = small_recipe(text_file, "default", bits=2), tmp_path / "out"
    model = model_folder("qwen2_moe")
    fresh = estimate(model, out, recipe)
    propose(model, out, recipe)
    scored = estimate(model, out, recipe)
    capsys.readouterr()
    compress(model, out, recipe)
    assert f"result {size_text(scored.folder_bytes)}" in capsys.readouterr().err
    finished = estimate(model, out, recipe)
    assert scored.folder_bytes == BitAllocation.load(out / PLAN).folder_bytes
    assert finished.folder_bytes == folder_bytes(out)
    assert fresh.folder_bytes < 0.95 * folder_bytes(out)


def test_without_a_budget_another_one_in_the_folder_is_no_hindrance(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = small_recipe(text_file, "fast", bits=2.5), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        module = importlib.import_module("moepress.quantize")
        patch.setattr(module, "quantize_layer", lambda *_: 1 / 0)
        compress(model_folder(), out, recipe)
    found = estimate(model_folder(), out, recipe.with_changes(bits=None))
    assert [(stage.name, stage.left) for stage in found.stages] == [("score", 0)]
    with pytest.raises(InputError, match="differs in: full_recipe"):
        estimate(model_folder(), out, recipe, bits=2)


def test_dry_run(
    model_folder: Folder, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from moepress.cli import app

    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small_recipe(text_file, "fast", bits=2.5).to_dict()))
    arguments = ["compress", str(model_folder()), str(tmp_path / "out")]
    arguments += ["--recipe", str(recipe), "--dry-run"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert all(word in shown.stdout for word in ("stage", "score", "quantize", "peak memory"))
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(printed.stdout)["kind"] == "estimate"
    assert not (tmp_path / "out").exists()


def test_reading_takes_no_time_without_files(tmp_path: Path) -> None:
    assert rates._reading([]) == (0, 0)
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    read, again = rates._reading([tmp_path / "file"])
    assert 0 < read < 1e-6
    assert 0 < again < 1e-6


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (0.4, 59, 190, 7500)]
    assert shown == ["0 s", "59 s", "3 min 10 s", "2 h 5 min"]


def test_the_package_has_it() -> None:
    assert moepress.estimate is estimate
