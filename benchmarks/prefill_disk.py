"""Prefill of a model whose experts are on disk: time, bytes read, and time spent waiting for them.

    python benchmarks/prefill_disk.py FOLDER --layers 4 --shares 1 0.33 0.1

FOLDER keeps Mixtral-8x7B's shape with that many layers, random codes at 2.5 bits, routers skewed as
in offload.py. Each share of the bytes of all experts is given to a store, which runs the same
prompts of 512 random tokens one after another; of 1, the first prompt reads everything. One JSON
line per share, with medians over the prompts after the first:

    seconds   of a prompt
    waited    of these, calls waited for reads
    read      experts' bytes that were read, over the bytes of all experts
    hits      experts needed that were in memory when their layer began, over those needed
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent))

import random_models
from moepress.hf import load_model
from moepress.store import statistics
from moepress.store.forecast import card_fits
from moepress.store.statistics import store_of
from offload import SKEW
from random_models import MIXTRAL


@torch.inference_mode()
def measure(folder: Path, memory: int, tokens: int, prompts: int) -> dict[str, float]:
    model = load_model(folder, memory=memory)
    draw = torch.Generator().manual_seed(0)
    seconds, counts = [], []
    for _ in range(prompts + 1):
        ids = torch.randint(0, MIXTRAL.vocab, (1, tokens), generator=draw)
        before, started = statistics(model), time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        seconds.append(time.perf_counter() - started)
        after = statistics(model)
        assert before is not None and after is not None
        counts.append(after.since(before).counts)
    store = store_of(model)
    assert store is not None
    later = counts[1:]
    return {
        "seconds": median(seconds[1:]),
        "waited": median(c.seconds_waited for c in later),
        "read": median(c.bytes_read for c in later) / store.nbytes,
        "hits": median(c.hits / c.uses for c in later),
        "first_seconds": seconds[0],
        "first_waited": counts[0].seconds_waited,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 0.33, 0.1])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--family", choices=["int", "trellis"], default="int")
    given = parser.parse_args()
    if not given.folder.exists():
        skew, _ = SKEW["Mixtral-8x7B"]["ours"]
        random_models.packed(given.folder, given.layers, 2.5, given.family, skew)
    (fit,) = card_fits(given.folder, 0).values()
    store = store_of(load_model(given.folder, memory=10**12))
    assert store is not None
    experts = store.nbytes
    del store
    for share in given.shares:
        memory = fit.other_bytes + int(share * experts) + 1
        found = measure(given.folder, memory, given.tokens, given.prompts)
        print(json.dumps({"share": share, **{k: round(v, 3) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
