"""How a command ends: with its result, with an error in one line, or stopped by a signal.

| exit code | why |
|---|---|
| 0 | done |
| 1 | the work failed |
| 2 | the input was wrong: an argument, a damaged file, weights that are not finite |
| 128 + n | stopped by signal n: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP |

A traceback is shown with `--debug` only. An exception that moepress did not expect is a defect of
moepress, and the line says so.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from moepress.cli.job import in_job, knows_what_is_kept, tells_error
from moepress.errors import InputError, MoepressError, printable
from moepress.writing.files import FULL

RESUMABLE = ("compress", "score", "quantize", "dequantize")  # they keep their unfinished work
SERVING = ("serve", "chat")  # they write nothing, and end by being stopped
SIGNALS = ("SIGTERM", "SIGHUP")  # Python itself turns SIGINT into KeyboardInterrupt
# What an operating system may refuse: not defects of moepress.
REFUSED = (
    *FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EMFILE,
    errno.ENFILE, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuSOLVER
)  # fmt: skip


class Stopped(BaseException):
    """A signal ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_debug = False


def set_debug(on: bool) -> None:
    """Whether errors are shown with their traceback."""
    global _debug
    _debug = on


def ended(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose every exception becomes one line on stderr and an exit code."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        with _signals_raise() as hold_signals:
            try:
                with in_job(command.__name__):
                    _check_words(sys.argv[1:])
                    command(*arguments, **options)
                    if sys.stdout is not None:  # `>&-` closes it
                        sys.stdout.flush()  # now, while an error can still be told
            except (typer.Exit, typer.Abort, SystemExit):
                raise
            except BrokenPipeError:  # a reader such as `head` has read enough
                _drop_output()
                raise typer.Exit(1) from None
            except BaseException as error:
                hold_signals()
                raise typer.Exit(_told(error)) from None

    return run


def _told(error: BaseException) -> int:
    """Say why a command failed. Returns its exit code."""
    if isinstance(error, OSError) and error.errno in FULL:
        _drop_output()
    text, code = described(error)
    if tells_error():
        if _debug:
            traceback.print_exc()
        typer.echo(f"moepress: {one_line(text)}", err=True)
    return code


def _drop_output() -> None:
    """What stdout holds and cannot write goes nowhere: Python would try it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere, suppress(OSError):  # a stdout without a file
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except (AttributeError, ValueError):  # None, or closed
        pass


def _check_words(words: list[str]) -> None:
    """Raise InputError for words that are not UTF-8, which Python reads as surrogates."""
    for word in words:
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            raise InputError(
                f"{word!r} is not UTF-8. The libraries that read weights, tokenizers and text take "
                "nothing else: rename it, or make a link with another name and give that."
            )


def described(error: BaseException) -> tuple[str, int]:
    """What an exception means to the user, and the exit code."""
    if isinstance(error, MoepressError):
        return str(error), 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt):
        return _stopped("Ctrl-C", error), 128 + signal.SIGINT
    if isinstance(error, Stopped):
        return _stopped(signal.Signals(error.number).name, error), 128 + error.number
    if isinstance(error, OSError) and error.errno in REFUSED:
        where = f" {error.filename}" if error.filename is not None else ""
        return f"The operating system refused{where}: {error.strerror}. {_DEBUG}", 1
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return (
            f"Out of memory: {error}. `moepress compress --dry-run` says how much a compression "
            "needs; fewer --sequences need less.",
            1,
        )
    kind = type(error).__name__
    return f"This is a defect of moepress, please report it: {kind}: {error}. {_DEBUG}", 1


_DEBUG = "The same command with --debug shows where."


def _stopped(how: str, error: BaseException) -> str:
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    kept = " ".join(getattr(error, "__notes__", ()))
    if name in RESUMABLE:
        again = shlex.join(["moepress", *sys.argv[1:]])
        if not knows_what_is_kept():
            kept = "Everything finished is kept."
        return f"stopped by {how}. {kept or 'Nothing was finished yet.'} To go on: {again}"
    if name in SERVING:
        return f"stopped by {how}."
    return f"stopped by {how}. {kept or 'Nothing was written.'}"


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which a file could have brought."""
    return printable(" ".join(text.split()))


@contextmanager
def _signals_raise() -> Iterator[Callable[[], None]]:
    """Inside the `with` statement, the first SIGTERM or SIGHUP raises `Stopped`; a second kills.

    The function that it gives has them ignored from then on: torchrun sends a SIGTERM to a rank
    that has lost another, and the rank has to say so first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {}
    for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, _raise)

    def hold() -> None:
        with suppress(Stopped):  # one that comes now comes too late
            for number in before:
                signal.signal(number, signal.SIG_IGN)

    try:
        yield hold
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)
