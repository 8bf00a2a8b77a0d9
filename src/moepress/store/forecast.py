"""How fast a folder will run in some memory, before it is opened."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moepress.errors import CheckpointError
from moepress.kernels.cpu.expert_store import PAGE, READERS, open_file

PIECE = 1 << 21  # bytes of a read, as of store.cpp
MOST_READ = 512 << 20  # bytes read to measure the speed of a drive


def read_speed(path: Path, most: int = MOST_READ) -> float:
    """Bytes per second that a file's drive gives to as many threads as a store has.

    The page cache is left out, where the system can.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        handle = open_file(path, direct=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
    try:
        size = min(os.fstat(handle).st_size // PAGE * PAGE, most)
        starts = range(0, size, PIECE)

        def read(worker: int) -> int:
            with mmap.mmap(-1, PIECE) as buffer:  # whole pages, as direct reads need
                return sum(os.preadv(handle, [buffer], at) for at in starts[worker::READERS])

        started = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            got = sum(pool.map(read, range(READERS)))
        return got / max(time.perf_counter() - started, 1e-9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(handle)
