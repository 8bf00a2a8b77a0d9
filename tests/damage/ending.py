"""How the reading of something damaged ends: with a result, in one line, or wrongly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from moepress.errors import CheckpointError, InputError, NumericalError

LONGEST = 20  # seconds
LINE = 1500  # characters of a message, paths included


class _TooLongError(Exception):
    pass


def outcome(read: Callable[[], str], longest: int = LONGEST) -> str:
    """What `read` returns, "refused: ..." if one line says why, or else "WRONG: ..."."""
    started = time.monotonic()
    try:
        with _limited(longest):
            return read()
    except (InputError, CheckpointError, NumericalError) as error:
        message = str(error)
        one_line = "\n" not in message.strip() and message.isprintable() and len(message) < LINE
        kind = type(error).__name__
        return f"refused: {kind}: {message}" if one_line else f"WRONG: no line: {message[:2000]!r}"
    except _TooLongError:
        return f"WRONG: hangs for {time.monotonic() - started:.0f} s"
    except BaseException as error:
        return f"WRONG: {type(error).__name__}: {str(error)[:300]}"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise _TooLongError inside the `with` statement after some seconds.

    Seconds count while this process may run: those of a stopped process (SIGSTOP) are one. Or of
    processor time, for a call that leaves no room for ticks.
    """
    began, ticks = time.process_time(), 0

    def tick(_: int, __: FrameType | None) -> None:
        nonlocal ticks
        ticks += 1
        if max(ticks, time.process_time() - began) > seconds:
            raise _TooLongError

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
