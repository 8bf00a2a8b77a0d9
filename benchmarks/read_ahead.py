"""Time walks through a model whose files are not in memory, with and without reading ahead.

    python benchmarks/mixtral_shape.py make m2 --layers 2     # 6 GB of bfloat16
    python benchmarks/read_ahead.py m2 --sequences 1 4

Before each walk the pages of the files are dropped from the system's memory (posix_fadvise
DONTNEED). A walk is one pass of the original model over random tokens, as the forward walk of
`compress`. "alone" reads every tensor of every layer and computes nothing. Linux only.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

import torch

from moepress.original.read_ahead import Need, ReadAhead
from moepress.original.source import Source
from moepress.original.upcoming import Upcoming
from moepress.original.walk import Walk
from moepress.progress import Progress, set_verbosity

LENGTH = 512


class Waits:
    """The seconds that a walk waits for the thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        wait_for = ReadAhead.wait_for

        def timed(ahead: ReadAhead, key: tuple[str, int | None]) -> None:
            began = time.perf_counter()
            wait_for(ahead, key)
            self.seconds += time.perf_counter() - began

        ReadAhead.wait_for = timed  # type: ignore[method-assign]


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
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4], help=f"of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    set_verbosity("quiet")
    files = Source(given.folder).files
    size = sum(path.stat().st_size for path in files)
    waits, begin = Waits(), Upcoming._begin

    def nothing(upcoming: Upcoming, needs: list[Need], what: str) -> None:
        begin(upcoming, [], what)

    drop(files)
    cold, warm = plain(files), plain(files)
    print(f"{size / 1e9:.2f} GB; plain reads {cold:.1f} s from disk, {warm:.1f} s from memory\n")
    print("| tokens | files | ahead | seconds | of them waiting for the thread | CPU-seconds |")
    print("|---|---|---|---|---|---|")
    for _ in range(given.rounds):
        for sequences in (0, *given.sequences):
            for on_disk in (True, False):
                for ahead in (False, True):
                    Upcoming._begin = begin if ahead else nothing  # type: ignore[method-assign]
                    source = Source(given.folder)
                    drop(files) if on_disk else plain(files)
                    waits.seconds, cpu = 0.0, time.process_time()
                    began = time.perf_counter()
                    walk(source, sequences) if sequences else alone(source)
                    seconds = time.perf_counter() - began
                    print(
                        f"| {sequences * LENGTH or 'alone'} | {'disk' if on_disk else 'memory'} "
                        f"| {'yes' if ahead else 'no'} | {seconds:.1f} | {waits.seconds:.1f} "
                        f"| {time.process_time() - cpu:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
