"""Time walks through a model whose files are not in memory, with and without reading ahead.

    python benchmarks/mixtral_shape.py make m2 --layers 2     # 6 GB of bfloat16
    python benchmarks/read_ahead.py m2 --sequences 1 4

Before a walk the pages of the files are dropped from the system's memory (posix_fadvise DONTNEED),
or all of them are read ("memory"). A walk is one pass of the original model over random tokens, as
the forward walk of `compress`. 0 sequences: every tensor of every layer is read, and nothing is
computed. "blocked" are the seconds in which the main thread neither ran nor waited for a core: it
waited for the disk, or for the thread that reads ahead. Other work on the machine changes that
little. With --rate the disk is a simulated one: whoever reads bytes first sleeps as long as a disk
of that rate would take. One thread computes. Linux only.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

import torch
from torch import Tensor

from moepress.original.quantized.headers import Entry
from moepress.original.read_ahead import Need, Place, ReadAhead
from moepress.original.source import Source
from moepress.original.upcoming import Upcoming
from moepress.original.walk import Walk
from moepress.progress import Progress, set_verbosity

LENGTH = 512


class SlowDisk:
    """Makes the first reading of every place take the time of a disk of some bytes per second."""

    def __init__(self, rate: float) -> None:
        self.known: set[Place] = set()
        one_at_a_time = threading.Lock()
        read, read_place = Entry.read, ReadAhead._read_place

        def wait(place: Place) -> None:
            with one_at_a_time:
                if place not in self.known:
                    self.known.add(place)
                    time.sleep((place.stop - place.start) / rate)

        def slow_read(entry: Entry, row: int | None = None, rows: int = 1) -> Tensor:
            wait(entry.place(row, rows))
            return read(entry, row, rows)

        def slow_place(ahead: ReadAhead, file: Any, place: Place, buffer: memoryview) -> None:
            wait(place)
            read_place(ahead, file, place, buffer)

        Entry.read = slow_read  # type: ignore[method-assign]
        ReadAhead._read_place = slow_place  # type: ignore[method-assign]


def scheduled() -> float:
    """Seconds in which this thread has run or waited for a core."""
    ran, waited, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
    return (ran + waited) / 1e9


def drop(files: Iterable[Path]) -> None:
    """Drop the pages of files from the system's memory."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(files: Iterable[Path]) -> float:
    """Seconds of reading files from beginning to end."""
    began, buffer = time.perf_counter(), bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def alone(source: Source) -> None:
    """Read every layer and every expert, one after the other."""
    for layer in range(len(source.layers)):
        with source.layer_loaded(layer):
            if layer in source.experts:
                for _ in source.experts_in_turn(layer, range(source.experts[layer].experts)):
                    pass


def walk(source: Source, sequences: int) -> None:
    """One pass of the original model."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = source.text_config.vocab_size
    ids = torch.randint(vocabulary, (sequences, LENGTH), generator=generator)
    with Progress("walk", len(source.layers)) as progress:
        Walk(source, ids).finish(progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[0, 1], help=f"of {LENGTH}")
    parser.add_argument("--files", nargs="+", default=["disk", "memory"])
    parser.add_argument("--rate", type=float, help="MB/s of a simulated disk")
    given = parser.parse_args()
    disk = SlowDisk(given.rate * 1e6) if given.rate else None
    set_verbosity("quiet")
    torch.set_num_threads(1)
    files = Source(given.folder).files
    size = sum(path.stat().st_size for path in files)
    begin = Upcoming._begin

    def nothing(upcoming: Upcoming, needs: list[Need], what: str) -> None:
        begin(upcoming, [], what)

    if disk is None:
        drop(files)
        cold, warm = plain(files), plain(files)
        print(f"{size / 1e9:.2f} GB; plain: {cold:.1f} s from disk, {warm:.1f} s from memory\n")
    print("| tokens | files | ahead | seconds | blocked | CPU-seconds |\n|---|---|---|---|---|---|")
    for sequences, place, ahead in product(given.sequences, given.files, (False, True)):
        Upcoming._begin = begin if ahead else nothing  # type: ignore[method-assign]
        source = Source(given.folder)
        drop(files) if place == "disk" else plain(files)
        if disk is not None:
            disk.known.clear()
        cpu, began, busy = time.process_time(), time.perf_counter(), scheduled()
        walk(source, sequences) if sequences else alone(source)
        seconds = time.perf_counter() - began
        cells = [seconds, seconds - (scheduled() - busy), time.process_time() - cpu]
        row = [str(sequences * LENGTH), place, "yes" if ahead else "no"]
        row += (f"{cell:.1f}" for cell in cells)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
