"""A cache of the first tokens of a text gives the logits of a text that begins so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moepress.hf.captured import CapturedSteps
from moepress.hf.past import CACHE
from moepress.hf.prefix import common, divisible, forgets, marked, prefix, reach
from tests.conftest import FAMILIES, make_model
from tests.families.models import make_model as tiny_family
from tests.serve.test_engine import model

TEXT = list(range(3, 33))
OTHER = list(range(60, 70))


def cache_of(net: Any) -> DynamicCache:
    return DynamicCache(config=net.config.get_text_config(decoder=True))


@torch.inference_mode()
def ran(net: Any, ids: Sequence[int], cache: DynamicCache, before: int = 0) -> Tensor:
    """Logits [V] after tokens behind `before` others."""
    places = torch.arange(before, before + len(ids))[None]
    out = net(input_ids=torch.tensor([ids]), position_ids=places, **{CACHE: cache})
    return out.logits[0, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [*FAMILIES, "sliding", "linear"])
def test_a_text_goes_on_from_the_first_tokens_of_another(kind: str) -> None:
    net = model(kind)
    cache = cache_of(net)
    ran(net, TEXT[:20], cache)
    marks = (marked(cache, 20),)
    after = ran(net, TEXT[20:], cache, 20)
    assert divisible(cache, net.config)
    assert forgets(cache) == (kind in ("sliding", "linear"))
    reached = {wanted: reach(cache, 30, marks, wanted) for wanted in (5, 20, 25, 30, 40)}
    assert reached[20] == 20 and reached[30] == reached[40] == 30
    assert (reached[5], reached[25]) == ((0, 20) if forgets(cache) else (5, 25))
    for first in sorted(set(reached.values()) - {0}):
        made = prefix(cache, 30, marks, first)
        got = ran(net, OTHER, made, first)
        right = ran(net, [*TEXT[:first], *OTHER], cache_of(net))
        torch.testing.assert_close(got, right, rtol=1e-3, atol=2e-3)
    # The other one is as it was, also where both write behind the same tokens.
    got = ran(net, OTHER, cache, 30)
    torch.testing.assert_close(got, ran(net, [*TEXT, *OTHER], cache_of(net)), rtol=1e-3, atol=2e-3)
    assert after.isfinite().all()


def test_keys_of_an_indexer() -> None:
    """All that is kept of a token, and nothing of others."""
    net = tiny_family("glm_moe_dsa").eval()
    whole, half = cache_of(net), cache_of(net)
    ran(net, TEXT, whole)
    ran(net, TEXT[:20], half)
    made = prefix(whole, 30, (), reach(whole, 30, (), 20))
    fields = ("keys", "values", "indexer_keys")
    for got, right, before in zip(made.layers, half.layers, whole.layers, strict=True):
        for name in fields:
            held = getattr(right, name)
            if held is not None:
                torch.testing.assert_close(getattr(got, name), held)
        assert before.get_seq_length() == 30
    assert any(layer.is_indexer_initialized for layer in made.layers)


@pytest.mark.parametrize("kind", ["mixtral", "sliding", "linear"])
def test_while_the_other_is_in_the_graph(kind: str) -> None:
    """Its layers show what lies elsewhere, and the next step writes there."""
    net = model(kind)
    text = TEXT[:20]
    with CapturedSteps(net) as steps, torch.inference_mode():
        cache = cache_of(net)
        ran(net, text, cache)
        mark = marked(cache, len(text))
        for token in OTHER:
            ran(net, [token], cache, len(text))
            text.append(token)
        assert steps.replayed
        parts = {first: prefix(cache, 30, (mark,), first) for first in (20, 30)}
        ran(net, [9], cache, len(text))
    for first, part in parts.items():
        got = ran(net, [5, 6], part, first)
        right = ran(net, [*text[:first], 5, 6], cache_of(net))
        torch.testing.assert_close(got, right, rtol=1e-3, atol=2e-3)


def test_what_cannot_be_divided() -> None:
    net = make_model("mixtral")
    cache = cache_of(net)
    ran(net, TEXT, cache)
    assert not divisible(None, net.config)
    for rope in ({"rope_type": "longrope"}, {"full_attention": {"rope_type": "dynamic"}}):
        config = copy.deepcopy(net.config)
        config.rope_parameters = rope
        assert not divisible(cache, config)
    cache.layers[1] = type("Other", (type(cache.layers[1]),), {})()
    assert not divisible(cache, net.config)


@pytest.mark.parametrize("same", [0, 1, 7, 8])
def test_common(same: int) -> None:
    one, other = list(range(8)), [*range(same), *range(90, 98)]
    assert common(one, other) == common(other, one) == same
    assert common(one, []) == 0
