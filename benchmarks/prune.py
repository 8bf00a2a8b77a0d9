"""Measure what online pruning costs: perplexity and KL by share of dropped choices.

    python benchmarks/prune.py MODEL --calib calib/*.txt --valid valid/*.txt [--bits 2.5 2.0]
    python benchmarks/prune.py MODEL --calib ... --valid ... --sampling

Each row compares a pruned model with the same model unpruned, on the same batches: ratio of
perplexities over all texts, and mean KL(unpruned || pruned) per token. The model is the original,
or a compressed folder that runs packed. Everything is computed in float32, because torch's bfloat16
products take eight times as long on CPUs without AMX. `--sampling` measures instead how sampling
the queries changes which tokens are protected.

    random          random choices, never the first of a token
    paper           the same quantile of the ratio in every layer and rank, weights renormalised
    paper, 2 %      the same, important tokens protected
    cheapest        thresholds solved from measured costs (the default)
    cheapest, 2 %   the same, important tokens protected

and both rules with the other treatment of the kept weights.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from measuring import LENGTH, WINDOWS_AT_A_TIME, base_recipe, opened, options
from moepress.calibrate import calibrate
from moepress.compress import compress
from moepress.costs.drop_costs import DropCosts
from moepress.original.architectures import decoder_layers
from moepress.prune import Pruned, Pruning, prune, stored_costs
from moepress.pruning import importance
from moepress.pruning.capture import capture_attention
from moepress.pruning.thresholds import cheapest, quantile
from moepress.text.windows import evaluation_tokens

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
Method = Callable[[Any, DropCosts, float], AbstractContextManager[Any]]


def by_quantile(costs: DropCosts, share: float, protect: float) -> Pruning:
    """The paper's rule at any share. With two experts per token, 0.25 is its median."""
    of_rank = share / costs.largest_share
    ratios = quantile(costs, np.full(costs.ratio.shape[:2], of_rank))
    return pruning(costs, np.pad(ratios, ((0, 0), (1, 0))), True, protect)


def pruning(costs: DropCosts, ratios: Any, renormalise: bool, protect: float) -> Pruning:
    rows = map(tuple, np.minimum(ratios, 1).tolist())
    return Pruning(dict(zip(costs.layers, rows, strict=True)), renormalise, protect)


@contextmanager
def random_drops(model: Any, costs: DropCosts, share: float) -> Iterator[Pruned]:
    """Drop random choices, never a token's first. Kept weights stay as they are."""
    generator = torch.Generator().manual_seed(0)
    keep_all = pruning(costs, np.zeros((len(costs.layers), costs.top_k)), False, 0.0)
    with prune(model, keep_all, count=True) as pruned:
        for layer in pruned._layers:
            layer._experts.register_forward_pre_hook(
                lambda experts, args, layer=layer: cut(experts, args, layer)
            )

        def cut(experts: Any, args: tuple[Tensor, ...], layer: Any) -> tuple[Tensor, ...]:
            hidden, index, weights = args  # by falling weight: the pruning hook has sorted them
            chance = torch.rand(index.shape, generator=generator) < share / costs.largest_share
            chance[:, 0] = False
            layer.dropped += chance.sum(0)
            return hidden, index.masked_fill(chance, experts.num_experts), weights * ~chance

        try:
            yield pruned
        finally:
            for layer in pruned._layers:
                hooks = layer._experts._forward_pre_hooks
                hooks.pop(next(reversed(hooks)))


def fixed(make: Callable[[DropCosts, float], Pruning]) -> Method:
    return lambda model, costs, share: prune(model, make(costs, share), count=True)


METHODS: dict[str, Method] = {
    "random": random_drops,
    "paper": fixed(lambda c, s: by_quantile(c, s, 0.0)),
    "paper, 2 %": fixed(lambda c, s: by_quantile(c, s, 0.02)),
    "paper, not renormalised": fixed(
        lambda c, s: Pruning(by_quantile(c, s, 0.0).thresholds, False, 0.0)
    ),
    "cheapest": fixed(lambda c, s: Pruning.of(c, s, 0.0)),
    "cheapest, 2 %": fixed(lambda c, s: Pruning.of(c, s, 0.02)),
    "cheapest, renormalised": fixed(lambda c, s: pruning(c, cheapest(c, s, True)[0], True, 0.0)),
}


@torch.inference_mode()
def compare(model: Any, costs: DropCosts, ids: Tensor, name: str) -> None:
    """Print one Markdown row for every method and share."""
    rows = [(method, share) for method in METHODS for share in SHARES]
    loss, kl, dropped = (dict.fromkeys(rows, 0.0) for _ in range(3))
    unpruned, tokens = 0.0, 0
    for batch in ids.split(WINDOWS_AT_A_TIME):
        target = batch[:, 1:, None]
        log_p = predict(model, batch)
        unpruned -= log_p.gather(2, target).sum().item()
        tokens += target.numel()
        p = log_p.exp()
        for method, share in rows:
            with METHODS[method](model, costs, share) as pruned:
                log_q = predict(model, batch)
                dropped[method, share] += pruned.statistics().share * len(batch) / len(ids)
            loss[method, share] -= log_q.gather(2, target).sum().item()
            kl[method, share] += (p * (log_p - log_q)).sum().item()
    for method, share in rows:
        ratio = math.exp((loss[method, share] - unpruned) / tokens)
        print(
            f"| {name} | {method} | {share:.2f} | {dropped[method, share]:.4f} | {ratio:.4f} "
            f"| {kl[method, share] / tokens:.5f} |",
            flush=True,
        )


def predict(model: Any, batch: Tensor) -> Tensor:
    out: Tensor = model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return out


@torch.inference_mode()
def sampling(model: Any, ids: Tensor, length: int) -> None:
    """Print the share of the protected tokens that a sample of the queries finds."""
    texts = ids.flatten()[: ids.numel() // length * length].view(-1, length)[:16]
    exact = torch.stack(protected(model, texts, length))
    late = exact[:, -length // 10 :].sum() / exact.sum()
    print(f"| {length} | all; of those in the last tenth of the text: | {late:.3f} |")
    for queries in (512, 256, 128, 64, 32):
        found = torch.stack(protected(model, texts, queries)) & exact
        print(f"| {length} | {queries} | {found.sum() / exact.sum():.3f} |", flush=True)


def protected(model: Any, texts: Tensor, queries: int) -> list[Tensor]:
    """Masks [length] of the protected tokens of every text and layer, with sampled queries."""
    importance.SAMPLED_QUERIES = queries
    chosen, undo = [], []
    for layer in decoder_layers(model):
        record = importance.AttentionRecord()
        undo += capture_attention(layer, record)

        def choose(_: Any, args: tuple[Tensor, ...], record: Any = record) -> None:
            chosen.append(importance.protected_tokens(args[0], record, 0.02))

        undo.append(layer.mlp.experts.register_forward_pre_hook(choose).remove)
    for text in texts:
        model(text[None], use_cache=False)
    while undo:
        undo.pop()()
    return chosen


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--bits", type=float, nargs="*", default=[2.5, 2.0])
    parser.add_argument("--sampling", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = base_recipe(given)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = [(text, 1.0) for text in given.valid]
    ids = evaluation_tokens(texts, tokenizer, LENGTH, given.windows).ids
    original = opened(given.model)
    if given.sampling:
        print("| tokens | sampled queries | protected tokens found |\n|---|---|---|")
        for length in (512, 1024, 2048):
            sampling(original, ids, length)
        return
    print("| model | method | wanted share | dropped share | perplexity ratio | KL |")
    print("|---" * 6 + "|")
    compare(original, calibrate(given.model, recipe).drop_costs, ids, "16 bits")
    for bits in given.bits:
        with tempfile.TemporaryDirectory() as folder:
            out = compress(given.model, Path(folder) / "out", recipe, bits=bits)
            compare(opened(out), stored_costs(out), ids, f"{bits} bits")


if __name__ == "__main__":
    main()
