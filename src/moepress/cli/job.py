"""A command as one of several ranks that torchrun started (ranks.py)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from moepress.errors import InputError

DIVIDED = ("compress", "score", "quantize")  # commands whose work ranks divide


@contextmanager
def in_job(command: str) -> Iterator[None]:
    """Inside the `with` statement, be a rank of the job, if torchrun started several processes.

    Ranks other than 0 print nothing there.

    Raises:
        InputError: the command is not one whose work is divided.
    """
    if not _several():
        yield
        return
    if command not in DIVIDED:
        raise InputError(
            f"torchrun started several processes of `moepress {command}`. Expected one: only "
            f"{', '.join(DIVIDED)} divide their work. Run it without torchrun."
        )
    from moepress.progress import set_verbosity
    from moepress.ranks import joined

    with joined() as ranks:
        if ranks.first:
            yield
            return
        logging.disable()
        set_verbosity("quiet")
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        with nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def knows_what_is_kept() -> bool:
    """Whether this process holds the output: in a job rank 0 does."""
    return not _several() or os.environ["RANK"] == "0"


def tells_error() -> bool:
    """Whether this process prints the error that ends it: the first rank of a machine does."""
    if not _several():
        return True
    from moepress.ranks import tells

    return tells()


def _several() -> bool:
    """Whether torchrun started this process, and others."""
    started = "TORCHELASTIC_RUN_ID" in os.environ
    return started and int(os.environ.get("WORLD_SIZE", "1")) > 1
