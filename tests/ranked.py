"""The command line as one rank: small batches and slices of columns, and perhaps a rank that dies.

    torchrun ... -m tests.ranked BATCH_TOKENS HOW RANK STAGE LAYER words of the command

HOW one rank dies when it comes to a layer of the stage ("score" or "quantize"): "kill" (SIGKILL),
"raise" (a computation fails), "full" (its disk is full); "none": nothing happens.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from typing import Any

from moepress import checks
from moepress.errors import NumericalError
from moepress.original import batches
from moepress.rounding import factor

tokens, how, rank, stage, at = sys.argv[1:6]
del sys.argv[1:6]
batches.BATCH_TOKENS = int(tokens)
checks.SEEN_AFTER = 3.0
factor.COLUMNS_PER_SLICE = 24  # so that there are several, and one of another size


def happens() -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise NumericalError("Layer 1 gives NaN.")
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "folder/file")


if how != "none" and os.environ["RANK"] == rank:
    module: Any = import_module(f"moepress.{stage}")
    real = getattr(module, f"{stage}_layer")

    def instead(walk: object, layer: int, *arguments: object) -> object:
        if layer == int(at):
            happens()
        return real(walk, layer, *arguments)

    setattr(module, f"{stage}_layer", instead)

from moepress.cli import main  # noqa: E402

main()
