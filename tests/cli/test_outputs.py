"""Every writing command looks at its output before any work, and takes nothing that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import pytest

from moepress.compress import compress
from moepress.format.checkpoint import PLAN, SCORES
from moepress.work import WORK
from tests.cli.test_cli import SMALL, run
from tests.conftest import small_recipe

Folder = Callable[..., Path]

FILES = {  # commands that write a file
    "calibrate": ["calibrate", "MODEL", "OUT", "--calib", "TEXT", *SMALL[:4]],
    "score": ["score", "MODEL", "OUT", "--calib", "TEXT", *SMALL],
    "allocate": ["allocate", "SCORES", "OUT", "--bits", "2"],
    "evaluate": ["evaluate", "MADE", "--text", "TEXT", "--out", "OUT"],
    "report": ["report", "MADE", "--out", "OUT"],
}
FOLDERS = {  # commands that write a folder
    "compress": ["compress", "MODEL", "OUT", "--bits", "2", "--calib", "TEXT", *SMALL],
    "propose": ["compress", "MODEL", "OUT", "--calib", "TEXT", *SMALL],
    "dry run": ["compress", "MODEL", "OUT", "--dry-run", "--calib", "TEXT", *SMALL],
    "quantize": ["quantize", "MODEL", "PLAN", "OUT"],
    "dequantize": ["dequantize", "MADE", "OUT"],
}
WORKERS = {  # what must not be reached: (module, name)
    "calibrate": ("moepress.calibrate", "calibration_ids"),
    "score": ("moepress.score", "kept_ids"),
    "allocate": ("moepress.allocate", "allocate"),
    "evaluate": ("moepress.evaluate", "evaluate"),
    "report": ("moepress.report", "render"),
    "compress": ("moepress.compress", "Request"),
    "propose": ("moepress.propose", "Request"),
    "dry run": ("moepress.estimate", "Request"),
    "quantize": ("moepress.quantize", "kept_ids"),
    "dequantize": ("moepress.dequantize", "unpacked_model"),
}


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Folder, text_file: Path
) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("made") / "a"
    yield compress(model_folder(), out, small_recipe(text_file, bits=2))


@pytest.fixture
def given(made: Path, model_folder: Folder, text_file: Path) -> dict[str, Path]:
    """What stands for the words in capitals, OUT apart."""
    return {
        "MODEL": model_folder(), "TEXT": text_file, "MADE": made, "SCORES": made / SCORES,
        "PLAN": made / PLAN,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_an_output_that_cannot_be_made_is_found_before_any_work(
    name: str,
    given: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "link").symlink_to("nowhere")

    def works(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    module, attribute = WORKERS[name]
    monkeypatch.setattr(import_module(module), attribute, works)
    words: Sequence[str] = {**FILES, **FOLDERS}[name]
    before = listing(tmp_path)
    for out in ("file", "file/out", "full", "link", "/dev/null", "/proc/out/out"):
        path = tmp_path / out  # an absolute one stays
        filled = [str(given.get(word, path if word == "OUT" else word)) for word in words]
        code, text, err = run(monkeypatch, capsys, "-q", *filled)
        assert code == 2 and text == "", (out, err)
        (line,) = [one for one in err.splitlines() if one.startswith("moepress: ")]
        assert str(path) in line, out
        assert listing(tmp_path) == before, out
    assert not Path("/dev/null").is_file()


def listing(folder: Path) -> list[tuple[str, int]]:
    return [(str(path), path.lstat().st_size) for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize("name", ["compress", "score", "quantize"])
def test_a_foreign_work_folder_is_refused_and_kept(
    name: str,
    given: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    work = tmp_path / "out.work" if name == "score" else out / WORK
    work.mkdir(parents=True)
    (work / "precious").touch()
    words = [str({**given, "OUT": out}.get(word, word)) for word in {**FILES, **FOLDERS}[name]]
    code, _, err = run(monkeypatch, capsys, "-q", *words)
    assert code == 2 and "has precious, which is not of moepress" in err
    assert [path.name for path in work.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "@", "hi"],
        ["chat", "@", "--raw"],
        ["evaluate", "@", "--text", "TEXT"],
        ["inspect", "@"],
        ["report", "@"],
        ["plot", "@", "pictures"],
        ["dequantize", "@", "out"],
        ["prune", "@", "0.1"],
        ["calibrate", "@", "c.safetensors", "--calib", "TEXT"],
        ["score", "@", "s.safetensors", "--calib", "TEXT"],
        ["quantize", "@", "PLAN", "out"],
        ["allocate", "@", "plan.json"],
        ["compress", "@", "out", "--calib", "TEXT"],
    ],
)
def test_what_is_no_model_is_one_line(
    words: Sequence[str],
    made: Path,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"a": 1}', encoding="utf-8")
    (tmp_path / "file").write_text("text", encoding="utf-8")
    models = ["missing", "empty", "other", "file", "owner/on-the-hub"]
    if words[0] in ("report", "plot", "dequantize", "prune"):
        models.append(str(model_folder()))  # not compressed
    before = listing(tmp_path)
    for model in models:
        given = {"@": model, "TEXT": text_file, "PLAN": made / PLAN}
        code, text, err = run(monkeypatch, capsys, "-q", *(given.get(w, w) for w in words))
        assert code == 2 and text == "", (model, err)
        (line,) = [one for one in err.splitlines() if one.startswith("moepress: ")]
        assert Path(model).name in line and "defect" not in line, line
        assert listing(tmp_path) == before, model
