"""Where the host waits for a card while experts are scored and rounded: once an expert, or a layer.

A wait for each chunk of tokens would let the card stand still in between.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moepress import kernels
from moepress.allocate import allocate
from moepress.original import batches
from moepress.original.source import Source
from moepress.pruning.layer import PrunedLayer
from moepress.pruning.rule import Pruning
from moepress.quantize import quantize
from moepress.rounding.held_out import held_out
from moepress.rounding.hessian import Hessian
from moepress.score import score
from tests.card.tensors import Card
from tests.conftest import small_recipe

LAYERS = 2
FOR_CHUNKS = (
    "costs/expert_costs", "costs/noisy_expert", "costs/sketch", "original/token_sums",
    "original/walk", "original/record",
    "rounding/correction", "rounding/expert", "rounding/factor", "rounding/fit",
    "rounding/held_out", "rounding/kept_tokens", "rounding/noisy_products",
    "rounding/summed_tokens",
)  # fmt: skip


def by_file(seen: Counter[str]) -> Counter[str]:
    """What a card has counted since the last call, by file of moepress."""
    found: Counter[str] = Counter()
    for why, count in seen.items():
        if place := re.search(r"moepress/([\w/]+)\.py:\d+$", why):
            found[place[1]] += count
    seen.clear()
    return found


@pytest.mark.card
def test_chunks_of_tokens_are_not_waited_for(
    model_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 16)  # so that experts have several chunks
    recipe = small_recipe(text_file, "default", bits=2.5, sequences=4, sequence_length=16)
    source = Source(model_folder(), "cuda")
    scores = score(source, recipe, work=tmp_path / "work")
    while_scored = by_file(card.waits)
    quantize(source, allocate(scores, recipe), tmp_path / "out")
    while_rounded = by_file(card.waits)

    seen = int((scores.tokens > 0).sum())
    assert while_scored["rounding/hessian"] > 0 and while_rounded["rounding/hessian"] > 0
    # A walk is waited for at the end of a layer: forward, once more to score, and two to round; the
    # recorded choices are two tensors.
    expected = Counter({"costs/expert_costs": seen})
    expected |= {"original/walk": 4 * LAYERS, "original/record": 4 * LAYERS}
    assert {name: while_scored[name] for name in FOR_CHUNKS if while_scored[name]} == expected
    del expected["costs/expert_costs"]
    assert {name: while_rounded[name] for name in FOR_CHUNKS if while_rounded[name]} == expected
    sent = by_file(card.uploads)
    assert sent["sending"] > 20 * seen
    assert not sent.keys() & {name for name in FOR_CHUNKS if name != "original/walk"}


def test_errors_on_other_tokens_are_not_waited_for(card: Card) -> None:
    hessian = Hessian(32, "cuda")
    hessian.add(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to("cuda"))
    factor = hessian.factor(0.01)
    by_file(card.waits), by_file(card.uploads)
    held_out(factor, torch.ones(50))
    assert not by_file(card.waits) and by_file(card.uploads).keys() == {"sending"}


def test_choices_of_many_experts_that_are_left_out_are_found_without_a_wait(card: Card) -> None:
    experts: Any = nn.Module()
    experts.num_experts, experts.left_out = 64, tuple(range(0, 60, 2))
    index = torch.tensor([[2, 5, 1, 7], [3, 64, -1, 9], [58, 0, 62, 1]])
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 3)
    ratios = (0.0, 0.3, 0.5, 0.6)
    pruned = PrunedLayer(0, nn.Module(), experts, Pruning({0: ratios}, False, 0), False)
    left = index.masked_fill(torch.isin(index, torch.tensor(experts.left_out)), 64)
    expected, *_ = kernels.drop(left, weights, torch.tensor(ratios), False, None, 64)
    there = [x.to("cuda") for x in (weights, index, weights)]
    pruned._before_experts(experts, (there[0], there[1], there[2]))  # the tables go there
    with card.without_waits():
        *_, found, _ = pruned._before_experts(experts, (there[0], there[1], there[2]))
    assert torch.equal(found.cpu(), expected)
