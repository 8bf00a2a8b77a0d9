"""Scaled norms and balanced linears of every family: the model stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.rounding.balanced_linears import find_pairs, scaled_pair
from moepress.rounding.folded_scale import find_readers, scale_readers
from moepress.rounding.same_layer import put, watch
from tests.families.models import make_model, open_model, save_model
from tests.families.state import FAMILIES
from tests.families.steps import same, scores
from tests.uneven import uneven

USUAL = ("deepseek_v3", "qwen3_next")
# Their norms follow attention and experts, or are read by more than linears.
NO_NORM = ("cohere2_moe", "flex_olmo", "jetmoe", "minimax", "qwen4_exp", "qwen4_exp_text")
# Fused linears, norms or limits between two linears.
NO_PAIR = (
    *("dbrx", "deepseek_v4", "glm5_next", "inkling2", "inkling2_loop", "inkling2_loop_text"),
    *("inkling2_text", "jetmoe", "muse_spark", "zaya"),
)


def families() -> Iterator[object]:
    for family in FAMILIES:
        marks = [] if family in USUAL else [pytest.mark.families]
        yield pytest.param(family, marks=marks)


@pytest.mark.parametrize("family", families())
def test_scaled_channels(family: str, tmp_path: Path) -> None:
    folder = save_model(make_model(family), tmp_path / family)
    source = Source(folder)
    ids = torch.randint(10, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    walk = Walk(source, ids)
    changed: dict[str, torch.Tensor] = {}
    norms = pairs = 0
    for layer in range(len(source.layers)):
        with source.layer_loaded(layer):
            packed = source.packable[layer].keys()
            before = {
                name: source.current(name) for name in source.names(source.layer_paths[layer])
            }
            for pair in find_pairs(walk, layer, packed, watch(walk, layer)):
                put(source, scaled_pair(source, pair, uneven(source.shape(pair.first)[0])))
                pairs += 1
            for readers in find_readers(walk, layer, packed, watch(walk, layer)):
                scale_readers(
                    source, readers, uneven(source.current(f"{readers.norm}.weight").numel())
                )
                norms += 1
            after = {name: source.current(name) for name in before}
            changed |= {
                name: value for name, value in after.items() if not torch.equal(value, before[name])
            }
            walk.pass_layer(layer)
    assert bool(norms) == (family not in NO_NORM)
    assert bool(pairs) == (family not in NO_PAIR)
    model = open_model(family, folder)
    inputs = {"input_ids": ids[:, :8]}
    with torch.no_grad():
        logits, generated = model(ids).logits, scores(model, inputs, "dynamic")
        parameters = dict(model.named_parameters())
        for name, value in changed.items():
            parameters[name].copy_(value)
        same(model(ids).logits, logits)
        same(scores(model, inputs, "dynamic"), generated)
