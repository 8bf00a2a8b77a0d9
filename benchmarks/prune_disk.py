"""Pruning of models whose experts are on disk: time gained and KL lost, by rule.

    python benchmarks/prune_disk.py MODEL --work FOLDER --calib calib/*.txt --valid valid/*.txt

FOLDER keeps the model, compressed with `default` at 2.5 bits. Half of the bytes of its experts are
in memory. Every rule has a model of its own; they take turns, text by text, with the same
tokens: a prompt of 64, and 192 that are decoded one by one. The first text only fills the stores,
and is decoded without pruning; the rules then know the share of misses. One Markdown row per rule:

    dropped       share of all choices
    KL            KL(unpruned || pruned) per decoded token, in nats
    reads         experts read per decoded token
    tokens/s      of decoding; `gain` is over no pruning
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))

from measuring import LENGTH, base_recipe, options
from moepress.compress import compress
from moepress.hf import load_model
from moepress.prune import Pruned, prune
from moepress.store import statistics
from moepress.store.forecast import card_fits
from moepress.store.statistics import store_of
from moepress.text.windows import evaluation_tokens

RULES: tuple[float | str, ...] = (0, 0.15, "disk:0.15")
PROMPT = 64


@dataclass
class Run:
    """One rule: its model, and what was measured."""

    rule: float | str
    model: Any
    pruned: Pruned | None = None
    seconds: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    reads: int = 0

    def decode(self, ids: Tensor) -> Tensor:
        """Log-probabilities [T - PROMPT, V] after every token of ids [T] beyond the prompt."""
        before = statistics(self.model)
        out = self.model(input_ids=ids[None, :PROMPT], use_cache=True, logits_to_keep=1)
        read_by_prompt = statistics(self.model)
        assert before is not None and read_by_prompt is not None
        found, started = [], time.perf_counter()
        for token in ids[PROMPT:]:
            out = self.model(
                input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits[0, -1])
        self.seconds += time.perf_counter() - started
        after = statistics(self.model)
        assert after is not None
        self.reads += after.since(read_by_prompt).counts.reads
        self.tokens += len(found)
        return torch.stack(found).float().log_softmax(-1)

    def forget(self) -> None:
        """Begin to measure."""
        self.seconds, self.kl, self.tokens, self.reads = 0.0, 0.0, 0, 0


def half_in_memory(folder: Path) -> Any:
    """The model, with half of its experts' memory."""
    (fit,) = card_fits(folder, 0).values()
    store = store_of(load_model(folder, memory=10**12))
    assert store is not None
    return load_model(folder, memory=fit.other_bytes + store.nbytes // 2, pruning=0)


@torch.inference_mode()
def measure(name: str, folder: Path, texts: list[Tensor]) -> None:
    runs = [Run(rule, half_in_memory(folder)) for rule in RULES]
    with ExitStack() as stack:
        for number, ids in enumerate(texts):
            if number == 1:
                for run in runs:
                    run.forget()
                    run.pruned = stack.enter_context(prune(run.model, run.rule, count=True))
            turn = number % len(runs)
            found = {run.rule: run.decode(ids) for run in runs[turn:] + runs[:turn]}
            for run in runs:
                p, q = found[0], found[run.rule]
                run.kl += float((p.exp() * (p - q)).sum())
    for run in runs:
        assert run.pruned is not None
        speed, unpruned = run.tokens / run.seconds, runs[0].tokens / runs[0].seconds
        print(
            f"| {name} | {run.rule or 'none'} | {run.pruned.statistics().share:.3f} "
            f"| {run.kl / run.tokens:.4f} | {run.reads / run.tokens:.2f} | {speed:.1f} "
            f"| {speed / unpruned - 1:+.1%} |",
            flush=True,
        )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = given.work / given.model.name
    if not folder.exists():
        compress(given.model, folder, base_recipe(given), bits=2.5)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = [(text, 1.0) for text in given.valid]
    ids = evaluation_tokens(texts, tokenizer, LENGTH, given.windows).ids
    print("| model | rule | dropped | KL | reads | tokens/s | gain |\n" + "|---" * 7 + "|")
    measure(given.model.name, folder, list(ids))


if __name__ == "__main__":
    main()
