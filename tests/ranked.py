"""The command line as one rank: small batches, and perhaps a rank that is killed.

    torchrun ... -m tests.ranked BATCH_TOKENS STAGE LAYER words of the command

If STAGE is "score" or "quantize", rank 1 kills itself when it comes to LAYER of it; "none": nobody.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

from moepress.original import batches

tokens, stage, at = sys.argv[1:4]
del sys.argv[1:4]
batches.BATCH_TOKENS = int(tokens)
if stage != "none" and os.environ["RANK"] == "1":
    module: Any = import_module(f"moepress.{stage}")
    real = getattr(module, f"{stage}_layer")

    def killed(walk: object, layer: int, *arguments: object) -> object:
        if layer == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(walk, layer, *arguments)

    setattr(module, f"{stage}_layer", killed)

from moepress.cli import main  # noqa: E402

main()
