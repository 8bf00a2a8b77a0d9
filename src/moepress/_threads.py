"""How long the threads of OpenMP spin while they wait for each other.

Threads that spin make small operations many times slower as soon as anything else runs on the
machine; threads that sleep at once cost a tenth of the decoding speed. A short spin, about ten
microseconds, avoids both (docs/log.md#short-spin and docs/log.md#passive-threads).
"""

from __future__ import annotations

import os
import sys

SPIN = "1000"  # rounds


def shorten_spin() -> None:
    """Ask GNU OpenMP for a short spin, unless the user has asked for something.

    OpenMP reads its environment once, when torch loads it: after `import torch` this has no effect,
    so nothing is set then.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
