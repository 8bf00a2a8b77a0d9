"""Compress, evaluate and run the small model that comes with moepress.

`model/` is a trained Mixtral of 4.5 million weights (its README.md is the model card;
`benchmarks/carried_model/train_model.py` trained it). The demo calibrates on some files of the
Python standard library and evaluates on others (text/corpus.py). Every installation has them, so
nothing is downloaded.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent / "model"
PROMPT = "class Queue:\n    def put(self, item):\n"
NEW_TOKENS = 48
WINDOWS = 64  # of 256 tokens each, for the evaluation


def demo(out: str | Path | None = None, *, bits: float = 2.5) -> dict[str, Any]:
    """Compress the small model and compare the result with the original.

    Args:
        out: folder for the compressed model and its evaluation; None: a temporary one.
        bits: average code bits of the routed experts.

    Returns:
        {"models": a row for the original and one for the compressed model, "prompt", "seconds"}.

    Raises:
        InputError: `out` cannot be written, or holds other files or another model.
    """
    from moepress.allocation.plan import BitAllocation
    from moepress.compress import compress
    from moepress.evaluate import evaluate
    from moepress.format.checkpoint import EVALUATION, PLAN, folder_bytes, temporary_folder
    from moepress.generate import generate
    from moepress.original.source import Source
    from moepress.work import check_output

    started = time.monotonic()
    if out is not None:
        check_output(Path(out))
    with temporary_folder(None if out is None else Path(out)) as folder:
        made = compress(
            MODEL,
            folder / "model" if out is None else folder,
            bits=bits,
            calib=(("stdlib", 1.0),),
            sequences=64,
            sequence_length=256,
        )
        result = evaluate(made, ["stdlib"], against=MODEL, limit=WINDOWS)
        result.save(made / EVALUATION)  # for `moepress report`
        (text,) = result.texts
        plan = BitAllocation.load(made / PLAN)
        bits_of_original = 8.0 * Source(MODEL).dtype.itemsize
        rows = [
            {
                "name": "original",
                "folder_bytes": folder_bytes(MODEL),
                "bits_per_weight": bits_of_original,
                "expert_bits_per_weight": bits_of_original,
                "perplexity": text.original_perplexity,
                "kl": 0.0,
                "sample": generate(MODEL, PROMPT, tokens=NEW_TOKENS),
            },
            {
                "name": f"{plan.average_bits:.2f}-bit experts",
                "folder_bytes": result.folder_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "expert_bits_per_weight": plan.expert_bits_per_weight,
                "perplexity": text.perplexity,
                "kl": text.kl,
                "sample": generate(made, PROMPT, tokens=NEW_TOKENS),
            },
        ]
    return {"models": rows, "prompt": PROMPT, "seconds": time.monotonic() - started}
