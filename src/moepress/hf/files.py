"""The files of a compressed folder's weights: compared with their checksums, read ahead of use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moepress.format.checksums import check_config, check_listed, read_checksums, verify
from moepress.memory import free_host_memory
from moepress.reading.headers import Entry

VERIFY = "MOEPRESS_VERIFY"  # environment variable; 1: compare all bytes whenever a folder is opened


def check_written(files: Sequence[str], stored: Mapping[str, Entry]) -> None:
    """Compare the tensors of a folder with what was written, if it has checksums.

    Warns if config.json is not as it was written (`check_config`).

    Args:
        files: its safetensors files.
        stored: their tensors, by name.

    Raises:
        FileError: names, dtypes or shapes differ, config.json packs tensors in another way, or
            bytes differ and MOEPRESS_VERIFY is 1.
        InputError: MOEPRESS_VERIFY is 1, and the folder has no checksums.
    """
    folder = Path(files[0]).parent
    checksums = read_checksums(folder)
    if checksums is not None:
        check_listed(checksums, stored)
        check_config(folder, checksums)
    if os.environ.get(VERIFY) == "1":
        verify(folder, map(Path, files))


def read_ahead(files: Iterable[str]) -> threading.Thread | None:
    """Read files once, in order, in a background thread, to fill the system's page cache.

    The weights are memory-mapped: without this, the first tokens fetch them page by page, in the
    order in which experts are chosen, at a fraction of the disk's speed.

    Returns:
        The thread; None if the files would not fit in free memory, where reading the last would
        evict the first.
    """
    paths = [Path(file) for file in files]
    if sum(path.stat().st_size for path in paths) > 0.9 * free_host_memory():
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
