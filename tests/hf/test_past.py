"""`generate` goes on from the cache of the text before, and writes what it would write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepress.hf.captured import CapturedSteps
from moepress.hf.past import CACHE, Past
from moepress.hf.prefix import MARKED, TAIL
from tests.conftest import FAMILIES
from tests.serve.test_engine import model

LONG = [5 + 7 * i % 40 for i in range(150)]


def written(net: Any, ids: list[int], past: Past | None = None) -> list[int]:
    """The tokens of a greedy answer. With a `past` it is kept."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        out = net.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            **({} if past is None else past.begin(ids)),
        )
    whole: list[int] = out[0].tolist()
    if past is not None:
        past.end(whole)
    return whole[len(ids) :]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", [*FAMILIES, "sliding", "linear"])
def test_turns(kind: str, captured: bool) -> None:
    net = model(kind)
    past, steps = Past(net), CapturedSteps(net)
    first = [*LONG, 7, 8, 9]
    answer = written(net, first)
    second = [*first, *answer, 60, 61, *LONG[:20]]  # goes on
    third = [*second[:-8], 62, 63]  # another question in place of the last one
    fourth = [*LONG[:-20], 64, 65, 66, 67]  # forgets most
    reused = []
    for ids in (first, second, third, fourth, [3, 4]):
        if captured:
            with steps:
                got = written(net, ids, past)
        else:
            got = written(net, ids, past)
        assert got == written(net, ids)
        reused.append(past.reused)
    held = len(first) + len(answer) - 1
    if kind == "linear":
        assert reused == [0] * 5
    elif kind == "sliding":
        assert reused == [0, held, len(second) - TAIL, 0, 0]
    else:
        assert reused == [0, held, len(second) - 8, len(LONG) - 20, 0]


@pytest.mark.parametrize("kind", ["mixtral", "sliding"])
def test_a_step_that_is_interrupted(kind: str) -> None:
    """Some layers have its token, and others do not."""
    net = model(kind)
    past = Past(net)
    ids = [*LONG, 7, 8, 9]
    options = past.begin(ids)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = net.model.layers[1].register_forward_pre_hook(interrupt)
    tokens = torch.tensor([ids])
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        net.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=9, **options)
    handle.remove()
    lengths = [layer.get_seq_length() for layer in options[CACHE].layers]
    assert lengths == [len(ids) + 3, len(ids) + 2]
    answer = written(net, ids)
    past.end([*ids, *answer[:3]], whole=False)
    again = [*ids, *answer[:3], 9, 9]
    assert written(net, again, past) == written(net, again)
    assert past.reused == (len(ids) - TAIL if kind == "sliding" else len(ids) + 2)


def test_an_unfinished_text_and_other_caches() -> None:
    net = model("mixtral")
    past = Past(net)
    past.begin(LONG)
    assert past.begin(LONG) and past.reused == 0  # the first one never ended
    written(net, LONG, past)
    past.forget()
    written(net, LONG, past)
    assert past.reused == 0
    net._supports_default_dynamic_cache = lambda: False  # it makes a cache of its own
    assert past.begin(LONG) == {}
    past.end(LONG)
    assert past.begin(LONG) == {}


def test_short_texts_are_computed_in_one_part() -> None:
    net = model("sliding")
    past = Past(net)
    for tokens, part in ((MARKED - 1, 0), (MARKED, MARKED - TAIL)):
        cache = past.begin(LONG[:tokens])[CACHE]
        assert cache.get_seq_length() == part
