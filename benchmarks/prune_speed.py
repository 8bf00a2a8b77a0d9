"""Measure how much time pruning saves: a model of Mixtral-8x7B's shape on the CPU kernels.

    python benchmarks/prune_speed.py FOLDER --rounds 7

Writes a model of 4 layers with random weights at 2.5 bits into FOLDER (2 GB), or uses the one that
is there. One process runs it with 0, 15 and 30 % of the choices dropped, in random order: prefills
of 512 tokens, and single tokens. All three settings run the same inputs. Thresholds are quantiles
of the random router's own ratios.

    work_saved   dropped share times the experts' share of the work: of the bytes read for a token
                 when decoding, of the multiplications in a prefill
    time_saved   1 - (time pruned) / (time unpruned), medians
    importance_and_rule   share of the pruned time that is spent on deciding what to drop
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import random_models
from cpu import LAYERS, timed
from mixtral_shape import VOCAB, report
from moepress import kernels
from moepress.kernels.modules import PackedExperts, PackedLinear
from moepress.prune import Pruning, prune
from moepress.pruning import importance, layer

PREFILL, DECODE = 512, 32
SHARES = (0.15, 0.3)


@contextmanager
def routing_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Within the block, collect the routing weights of every layer that runs."""
    found: list[torch.Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: found.append(args[2]))
        for m in model.modules()
        if isinstance(m, PackedExperts)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def at_share(model: Any, ids: torch.Tensor, share: float) -> Pruning:
    """Thresholds that drop a share of all choices of a model with two experts per token."""
    with routing_of(model) as weights:
        model(ids)
    ratios = [w.float().amin(1) / w.float().amax(1) for w in weights]
    return Pruning({i: (0.0, r.quantile(2 * share).item()) for i, r in enumerate(ratios)}, False)


def tasks(model: Any) -> dict[str, list[Callable[[], Any]]]:
    """The calls to time, by task; every setting times all of them."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCAB, (1, PREFILL), generator=generator)
    tokens = torch.randint(VOCAB, (DECODE, 1, 1), generator=generator)
    cache = model(prompt[:, :16], use_cache=True).past_key_values

    def decode(token: torch.Tensor) -> None:  # random tokens: a random model soon repeats itself
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return {
        "decode": [partial(decode, token) for token in tokens],
        "prefill": [lambda: model(prompt, logits_to_keep=1)],
    }


def part_of_pruning(run: Callable[[], Any]) -> float:
    """The share of a run's time that importance, protection and the rule itself take."""
    places = [
        (importance, "column_means"),
        (layer, "protected_tokens"),
        (kernels, "drop"),
    ]
    spent = [0.0]

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            spent[0] += time.perf_counter() - started
            return result

        return call

    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, clocked(original))
    total = timed(run)
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, original)
    return spent[0] / total


def experts_part(model: Any, task: str) -> float:
    """The routed experts' share of the work: of a token's bytes, or of the multiplications."""
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if task == "decode":
        ours = sum(p.numel() for m in experts for p in m.parameters()) * 2 / experts[0].num_experts
        others = sum(m.weight.numel() for m in linears)
    else:
        ours = sum(2 * 3 * m.hidden_size * m.intermediate_size for m in experts)
        others = sum(m.in_features * m.out_features for m in linears if m.out_features != VOCAB)
    return ours / (ours + others)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    path = given.folder / "ours-2.5"
    if not path.exists():
        random_models.packed(path, LAYERS, 2.5)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    ids = torch.randint(VOCAB, (1, 1024), generator=torch.Generator().manual_seed(0))
    rules = {f"{share:.0%}": at_share(model, ids, share) for share in SHARES}
    ways = {"none": None, **rules}
    order = random.Random(0)  # in a fixed order, each setting would always follow the same one
    for task, runs in tasks(model).items():
        shares = {}
        for name, rule in rules.items():
            with prune(model, rule, count=True) as pruned:
                for run in runs:
                    run()
                shares[name] = pruned.statistics().share
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(given.rounds * len(runs)):
            for number in order.sample(range(len(ways)), len(ways)):
                name, rule = list(ways.items())[number]
                run = runs[(turn + number * len(runs) // len(ways)) % len(runs)]
                with nullcontext() if rule is None else prune(model, rule):
                    seconds[name].append(timed(run))
        show(task, seconds, shares, experts_part(model, task))
        with prune(model, next(iter(rules.values()))):
            report(task=task, importance_and_rule=f"{median(map(part_of_pruning, runs * 5)):.4f}")


def show(task: str, seconds: dict[str, list[float]], shares: dict[str, float], part: float) -> None:
    usual = median(seconds["none"])
    count = PREFILL if task == "prefill" else 1
    report(task=task, tokens_per_s=count / usual, experts_part=part)
    for name, times in seconds.items():
        saved = 1 - median(times) / usual
        work = shares.get(name, 0.0) * part
        values = {"work_saved": f"{work:.3f}", "per_work": f"{saved / work:.2f}"} if work else {}
        dropped = f"{shares.get(name, 0.0):.3f}"
        report(task=task, pruned=name, dropped=dropped, time_saved=f"{saved:.3f}", **values)


if __name__ == "__main__":
    main()
