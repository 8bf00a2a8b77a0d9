"""Progress goes to stderr, as lines or as a bar; "quiet" hides it."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator

import pytest

from moepress import progress
from moepress.errors import InputError
from moepress.progress import Progress, set_verbosity


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture(autouse=True)
def shown() -> Iterator[None]:
    before = progress._verbosity
    set_verbosity("normal")
    yield
    set_verbosity(before)


def test_lines_are_sparse_and_on_stderr(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("score", total=20) as steps:
        for layer in range(20):
            for expert in range(100):
                steps.update(layer=layer, expert=expert, experts=100)
            clock.now += 2.0
            steps.advance()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"score: {n}/20" for n in (3, 6, 9, 12, 15, 18, 20)
    ]
    assert "0:00:06 elapsed, 0:00:34 left" in lines[0]
    assert lines[0].endswith(" GB")
    assert "left" not in lines[-1]


def test_describe_counts_from_one(clock: Clock) -> None:
    steps = Progress("score", total=4)
    steps.update(layer=2, expert=17, experts=128, note="[gptq]")
    assert steps.describe().startswith("3/4, expert 18/128, 0:00:00 elapsed, ")
    assert steps.describe().endswith(" GB, [gptq]")
    steps.update(layer=2, expert=0)
    assert steps.describe().startswith("3/4, expert 1, 0:00:00 elapsed, ")


def test_time_left_counts_experts_and_leaves_out_earlier_runs(clock: Clock) -> None:
    steps = Progress("score", total=10)
    steps.skip(6)
    assert "left" not in steps.describe()
    clock.now += 30
    steps.update(layer=6, expert=4, experts=8)  # half a layer took 30 s: 3.5 layers are left
    assert "0:00:30 elapsed, 0:03:30 left" in steps.describe()
    steps.advance()
    assert steps.describe().startswith("7/10, 0:00:30 elapsed, 0:01:30 left")


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity("quiet")
    with Progress("score", total=1) as steps:
        steps.update(layer=0)
        steps.advance()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(InputError, match="'loud'"):
        set_verbosity("loud")  # type: ignore[arg-type]


def test_a_terminal_gets_a_bar_that_is_taken_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    stdout, threads = sys.stdout, set(threading.enumerate())
    with pytest.raises(KeyError), Progress("score", total=3) as steps:
        assert sys.stdout is stdout
        steps.update(layer=1, expert=2, experts=8, note="long " * 40)
        print("a result")
        raise KeyError
    assert sys.stderr is terminal
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert "2/3, expert 3/8" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1  # it stays on one line, however narrow
    assert capsys.readouterr().out == "a result\n"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("score", total=1) as steps:
        steps.advance()
    assert terminal.getvalue().startswith("score: 1/1, 0:00:00 elapsed")
    assert "\x1b" not in terminal.getvalue()
