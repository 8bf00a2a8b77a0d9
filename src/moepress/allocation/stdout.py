"""Keep what C code prints off stdout, which is for results."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Inside the `with` statement, what C code prints to stdout goes to stderr.

    HiGHS 1.12 prints a line now and then, whatever its options are.
    """
    try:
        kept, libc = os.dup(1), ctypes.CDLL(None)  # None: all libraries loaded, libc among them
    except (OSError, TypeError):  # stdout is closed, or the platform has no such handle (Windows)
        yield
        return
    try:
        libc.fflush(None)
        os.dup2(2, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
