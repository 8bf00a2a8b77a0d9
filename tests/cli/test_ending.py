"""How commands end: one line for every error, signals, a reader that went away, a second run."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from moepress import cli
from moepress.cli import ending
from moepress.errors import CheckpointError, InputError
from tests.cli.test_cli import run

Folder = Callable[..., Path]
SMALL = ["--sequences", "6", "--sequence-length", "32", "--group-size", "32"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("wrong\nfile \x1b[31m"), 2, "moepress: wrong file \\x1b[31m"),
        (CheckpointError("damaged"), 1, "moepress: damaged"),
        (KeyError("x"), 1, "This is a defect of moepress, please report it: KeyError: 'x'"),
        (OSError(errno.ENOSPC, "No space left", "f"), 1, "refused f: No space left"),
        (MemoryError("42 GB"), 1, "Out of memory: 42 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Out of memory"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C. Nothing was written."),
        (ending.Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
    ],
)
def test_every_exception_is_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(import_module("moepress.inspect"), "inspect", fails)
    found, out, err = run(monkeypatch, capsys, "inspect", "some/path")
    assert found == code and says in err and len(err.splitlines()) == 1 and out == ""
    found, out, err = run(monkeypatch, capsys, "inspect", "some/path", "--debug")
    assert found == code and says in err.splitlines()[-1] and "in fails" in err
    ending.set_debug(False)


def test_debug_is_moved_before_the_command_but_not_from_behind_two_dashes() -> None:
    assert cli._debug_first(["a", "b", "--debug"]) == ["--debug", "a", "b"]
    assert cli._debug_first(["a", "--", "--debug"]) == ["a", "--", "--debug"]


def start(*words: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moepress", *map(str, words)]
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_the_work_and_the_same_command_ends_it(
    number: signal.Signals, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["compress", model_folder(), out, "--bits", 2, "--calib", text_file, *SMALL]
    process = start("-q", *words)
    while not (out / ".moepress" / "text.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    how = "Ctrl-C" if number == signal.SIGINT else number.name
    (line,) = [line for line in err.splitlines() if line.startswith("moepress: ")]
    assert f"stopped by {how}. Kept in {out}: the calibration text" in line
    assert re.search(r"To go on: moepress -q compress .*--bits 2", line) and "Traceback" not in err
    assert not (out / ".moepress" / "lock").exists()


def test_two_runs_into_one_folder(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from moepress.work import output_held

    out = tmp_path / "out"
    words = ["compress", model_folder(), out, "--bits", 2, "--calib", text_file, *SMALL]
    with output_held(out):
        code, _, err = run(monkeypatch, capsys, *words)
    assert code == 2 and f"{out} is in use by process {os.getpid()} since" in err
    assert not out.exists()


def test_a_reader_that_goes_away_and_a_full_output(model_folder: Folder) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone, Path("/dev/full").open("w") as full:
        for to, says in ((gone, ""), (full, "refused: No space left on device")):
            command = [sys.executable, "-m", "moepress", "inspect", str(model_folder()), "--json"]
            done = subprocess.run(command, stdout=to, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 1 and says in done.stderr
            assert "Traceback" not in done.stderr and "ignored" not in done.stderr
