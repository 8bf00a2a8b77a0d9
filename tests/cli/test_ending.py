"""How commands end: one line for every error, signals, a reader that went away, a second run."""

from __future__ import annotations

import errno
import os
import platform
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
from tests.cli.test_cli import SMALL, run

Folder = Callable[..., Path]


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


def test_options_for_all_are_moved_before_the_command_but_not_from_behind_two_dashes() -> None:
    assert cli._for_all_first(["a", "b", "--debug"]) == ["--debug", "a", "b"]
    assert cli._for_all_first(["a", "--", "--debug"]) == ["a", "--", "--debug"]
    assert cli._for_all_first(["a", "b", "--debug", "-q"]) == ["--debug", "-q", "a", "b"]


def test_a_signal_keeps_the_work(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["-q", "compress", model_folder(), out, "--bits", 2, "--calib", text_file, *SMALL]
    command = [sys.executable, "-m", "moepress", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / ".moepress" / "text.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    (line,) = [line for line in err.splitlines() if line.startswith("moepress: ")]
    assert f"stopped by SIGTERM. Kept in {out}: the calibration text" in line
    assert re.search(r"To go on: moepress -q compress .*--bits 2", line) and "Traceback" not in err
    assert not (out / ".moepress" / "lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_in_commands_that_keep_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def waits(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(import_module("moepress.inspect"), "inspect", waits)
    # The handlers of a command in the foreground. A process that was started by nohup, or by `&` in
    # a script, has inherited that SIGHUP or SIGINT is ignored.
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, usual)
    try:
        code, _, err = run(monkeypatch, capsys, "inspect", "some/path")
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, inherited)
    how = "Ctrl-C" if number == signal.SIGINT else number.name
    assert code == 128 + number
    assert err == f"moepress: stopped by {how}. Nothing was written.\n"


def test_a_signal_that_comes_when_the_command_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun stops the ranks that are left, which tell meanwhile why they end."""

    def late(error: BaseException) -> tuple[str, int]:
        os.kill(os.getpid(), signal.SIGTERM)
        return str(error), 1

    def fails(*_: object, **__: object) -> None:
        raise CheckpointError("the reason")

    came: list[int] = []
    monkeypatch.setattr(import_module("moepress.inspect"), "inspect", fails)
    monkeypatch.setattr(ending, "described", late)
    inherited = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        code, _, err = run(monkeypatch, capsys, "inspect", "some/path")
    finally:
        signal.signal(signal.SIGTERM, inherited)
    assert (code, err, came) == (1, "moepress: the reason\n", [])


def test_two_runs_into_one_folder(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from moepress.work import output_held

    out = tmp_path / "out"
    words = ["compress", model_folder(), out, "--bits", 2, "--calib", text_file, *SMALL]
    with output_held(out):
        code, _, err = run(monkeypatch, capsys, *words)
    holder = f"by process {os.getpid()} on {platform.node()} since"
    assert code == 2 and f"{out} is in use {holder}" in err
    assert not out.exists()


def test_a_reader_that_goes_away_and_a_full_output() -> None:
    code = (
        "import typer\n"
        "from moepress.cli.ending import ended\n"
        "app = typer.Typer()\n"
        "app.command()(ended(lambda: print('x')))\n"
        "app()\n"
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone, Path("/dev/full").open("w") as full:
        for to, says in ((gone, ""), (full, "moepress: The operating system refused: No space")):
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, stdout=to, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 1 and done.stderr.startswith(says)
            assert len(done.stderr.splitlines()) == bool(says)


@pytest.mark.parametrize("to", ["None", "open('/dev/null', 'w')"])
def test_no_output_at_all(to: str) -> None:
    """As after `>&-`; a closed file."""
    code = (
        "import sys, typer\n"
        "from moepress.cli.ending import ended\n"
        "from moepress.errors import InputError\n"
        f"sys.stdout = {to}\n"
        "sys.stdout and sys.stdout.close()\n"
        "def fail():\n"
        "    raise InputError('wrong')\n"
        "app = typer.Typer()\n"
        "app.command()(ended(fail))\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "moepress: wrong\n")


def test_words_that_are_not_utf8_are_called_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    tmp_path: Path,
) -> None:
    named = tmp_path / os.fsdecode(b"caf\xe9")
    named.symlink_to(model_folder())
    code, out, err = run(monkeypatch, capsys, "inspect", named)
    assert code == 2 and out == "" and "caf\\udce9' is not UTF-8" in err
    (tmp_path / "caf\u00e9").symlink_to(named)
    assert run(monkeypatch, capsys, "inspect", tmp_path / "caf\u00e9")[0] == 0


def test_a_server_that_is_stopped_has_written_nothing_and_does_not_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for command, says in (("serve", ""), ("chat", ""), ("evaluate", " Nothing was written.")):
        monkeypatch.setattr(sys, "argv", ["moepress", command, "folder"])
        assert ending.described(ending.Stopped(15)) == (f"stopped by SIGTERM.{says}", 143)
