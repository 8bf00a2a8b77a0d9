"""Progress of a stage, on stderr: a live bar on a terminal, an occasional line elsewhere.

    with Progress("score", total=layers) as progress:
        progress.update(layer=3, expert=17, experts=128)  # working on this
        progress.advance()  # the layer is done

`update` only stores numbers, so inner loops may call it freely: the text is made when it is shown,
at most twice a second. Nothing is written to stdout, which is for results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self, get_args

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moepress.errors import InputError

Verbosity = Literal["quiet", "normal"]

REFRESHES_PER_SECOND = 2  # of the live bar
SECONDS_BETWEEN_LINES = 5.0  # where there is no terminal
TELL_AFTER, TELL_AGAIN = 5.0, 60.0  # seconds of waiting until it is told, and told again
_verbosity: Verbosity = "normal"


def set_verbosity(verbosity: Verbosity) -> None:
    """Show progress of the stages that start after this call ("normal"), or hide it ("quiet")."""
    if verbosity not in get_args(Verbosity):
        raise InputError(f"Verbosity {verbosity!r}: expected one of {list(get_args(Verbosity))}.")
    global _verbosity
    _verbosity = verbosity


def announce(name: str, text: Callable[[], str]) -> None:
    """Show one line "name: text" on stderr, unless progress is hidden.

    Args:
        text: called only if the line is shown.
    """
    if _verbosity != "quiet":
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"{name}: {text()}", markup=False)


@contextmanager
def told_if_slow(name: str, text: str) -> Iterator[None]:
    """Announce a text if what is inside the `with` statement takes more than TELL_AFTER seconds."""
    timer = threading.Timer(TELL_AFTER, announce, (name, lambda: text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """Show stage, layer, expert, elapsed and remaining time, and resident memory.

    Args:
        stage: name of the stage, one word.
        total: number of steps. A step is a layer; in stages that never pass `layer`, a batch.
    """

    def __init__(self, stage: str, total: int) -> None:
        self.stage = stage
        self.total = total
        self.done = 0
        self._skipped = 0
        self._layer: int | None = None
        self._expert: int | None = None
        self._experts: int | None = None
        self._note = ""
        self._began = self._shown = time.monotonic()
        self._console: Console | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if _verbosity == "quiet":
            return self
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._bar,
                refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stdout=False,  # it would send stdout to stderr
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def skip(self, count: int) -> None:
        """Count steps done by an earlier run; they do not enter the estimate of remaining time."""
        self.done += count
        self._skipped += count

    def update(
        self,
        *,
        layer: int | None = None,
        expert: int | None = None,
        experts: int | None = None,
        note: str = "",
    ) -> None:
        """Set what is being worked on, counted from 0. Omitted values are no longer shown."""
        self._layer, self._expert, self._experts, self._note = layer, expert, experts, note

    def advance(self) -> None:
        """Count one step as done."""
        self.done += 1
        self.update()
        if self._console is None or self._live is not None:
            return
        now = time.monotonic()
        if self.done >= self.total or now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            self._console.print(f"{self.stage}: {self.describe()}", markup=False)

    def describe(self) -> str:
        """The state as text: "4/32, expert 18/128, 0:01:02 elapsed, 0:08:10 left, 3.2 GB"."""
        now = time.monotonic()
        shown = self.done if self._layer is None else self._layer + 1
        words = [f"{shown}/{self.total}"]
        if self._expert is not None:
            total = "" if self._experts is None else f"/{self._experts}"
            words.append(f"expert {self._expert + 1}{total}")
        words.append(f"{timedelta(seconds=int(now - self._began))} elapsed")
        left = self._seconds_left(now - self._began)
        if left is not None:
            words.append(f"{timedelta(seconds=round(left))} left")
        words.append(f"{psutil.Process().memory_info().rss / 1e9:.1f} GB")
        return ", ".join([*words, self._note] if self._note else words)

    def _position(self) -> float:
        """Steps done, including the finished fraction of the current one."""
        inside = self._expert / self._experts if self._expert and self._experts else 0.0
        return min(self.done + inside, self.total)

    def _seconds_left(self, elapsed: float) -> float | None:
        position = self._position()
        if not self._skipped < position < self.total:
            return None
        return elapsed / (position - self._skipped) * (self.total - position)

    def _bar(self) -> Table:
        row = Table.grid(padding=(0, 1))
        # Never more than one line: Live could not tell a second line of its own from a line that
        # other code prints.
        text = Text(self.describe(), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=self.total, completed=self._position(), width=12)
        row.add_row(self.stage, bar, text)
        return row
