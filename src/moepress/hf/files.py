"""The files of a compressed folder's weights, read ahead of use."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import psutil


def read_ahead(files: Iterable[str]) -> threading.Thread | None:
    """Read files once, in order, in a background thread, to fill the system's page cache.

    The weights are memory-mapped: without this, the first tokens fetch them page by page, in the
    order in which experts are chosen, at a fraction of the disk's speed.

    Returns:
        The thread; None if the files would not fit in free memory, where reading the last would
        evict the first.
    """
    paths = [Path(file) for file in files]
    if sum(path.stat().st_size for path in paths) > 0.9 * psutil.virtual_memory().available:
        return None

    def run() -> None:
        buffer = bytearray(8 << 20)
        for path in paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            except OSError:  # only a speed-up: reading the weights themselves reports the error
                return

    thread = threading.Thread(target=run, name="moepress-read-ahead", daemon=True)
    thread.start()
    return thread
