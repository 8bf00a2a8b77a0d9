"""How long the threads of OpenMP spin while they wait for each other.

Threads that spin make small operations many times slower as soon as anything else runs on the
machine; threads that sleep at once cost a tenth of the decoding speed. A short spin, about ten
microseconds, avoids both (docs/log.md#short-spin and docs/log.md#passive-threads). Decoding of
small experts still loses a tenth by it, so commands that only decode ask for a long one, about a
millisecond, if nothing else keeps the machine busy (docs/log.md#grouped-attention).
"""

from __future__ import annotations

import os
import sys

NAME = "GOMP_SPINCOUNT"
SHORT, LONG = "1000", "100000"  # rounds
BUSY = 0.5  # processes that want to run, for each core


def shorten_spin() -> None:
    """Ask GNU OpenMP for a short spin, unless the user has asked for something.

    OpenMP reads its environment once, when torch loads it: after `import torch` this has no effect,
    so nothing is set then.
    """
    if (
        "torch" not in sys.modules
        and "OMP_WAIT_POLICY" not in os.environ
        and NAME not in os.environ
    ):
        os.environ[NAME] = SHORT
        _set.append(SHORT)


def lengthen_spin() -> None:
    """Ask for a long spin, where `shorten_spin` asked for a short one and cores are idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if _set and "torch" not in sys.modules and os.getloadavg()[0] <= BUSY * (cores or 1):
        os.environ[NAME] = LONG


_set: list[str] = []  # what this module has set
