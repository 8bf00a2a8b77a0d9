"""Prompts begin with what the model keeps of other texts, and answers are what they would be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moepress.hf import prefix
from moepress.hf.growing_cache import room_beyond
from moepress.serve import engine as engines
from moepress.serve.limits import Limits
from moepress.serve.model import served_by
from tests.conftest import FAMILIES
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.conftest import NAME, Here, serving, started
from tests.serve.test_engine import model

SYSTEM = [5 + 7 * i % 40 for i in range(150)]
Serve = Callable[..., Here]


@pytest.fixture
def serve(chat_folder: Path) -> Iterator[Serve]:
    """Serves the folder, or a model of a kind, in a server of its own."""
    made: list[Here] = []

    def serve(kind: str | None = None, reuse: bool = True, **limits: Any) -> Here:
        if kind is None:
            here = serving(chat_folder, Limits(**limits), reuse=reuse)
        else:
            served = served_by(model(kind), llama_tokenizer(), NAME, Limits(**limits), reuse)
            here = started(served)
        made.append(here)
        return here

    yield serve
    assert all(here.served.engine.stop(30) for here in made)


def kept(here: Here) -> list[list[int]]:
    """The texts that an engine keeps once it is done; the one used last at the end."""
    engine = here.served.engine
    while engine.running or engine._turn_began is not None:
        time.sleep(0.001)
    return [state.ids for state in engine._kept._states]


def said(answer: dict[str, Any]) -> tuple[int, str, list[float]]:
    """Tokens that were reused, the text, and the logprobs of its tokens."""
    (choice,) = answer["choices"]
    reused = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return reused, choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("kind", [*FAMILIES, "sliding", "linear"])
def test_turns_of_a_conversation(kind: str, serve: Serve) -> None:
    """The second prompt has the first one but for its last tokens, and no tokens of its answer."""
    here, plain = serve(kind), serve(kind, reuse=False)
    forgets = here.served.engine.stepper.forgets
    assert forgets == (kind in ("sliding", "linear"))
    first = [*SYSTEM, 7, 8, 9]
    turns = [first, [*first[:-3], 60, 61, 62, *SYSTEM[:20]], [*first, *SYSTEM[:20]]]
    marks = [0, len(first) - prefix.TAIL, len(first) - prefix.TAIL]
    shared = [0, len(first) - 3, len(first)]
    for prompt, reused in zip(turns, marks if forgets else shared, strict=True):
        fields: dict[str, Any] = {"max_tokens": 6, "logprobs": 0}
        got, text, logprobs = said(here.complete(prompt, **fields))
        none, right, expected = said(plain.complete(prompt, **fields))
        assert (got, none) == (reused, 0)
        assert text == right and logprobs == pytest.approx(expected, abs=2e-3)
    engine = here.served.engine
    assert engine.prefilled + engine.reused == sum(map(len, turns))
    assert plain.served.engine.reused == 0


def test_a_text_that_goes_on_is_not_kept_twice(serve: Serve) -> None:
    here = serve()
    prompt = list(SYSTEM)
    for turn in range(3):
        reused, _, _ = said(here.complete(prompt, max_tokens=5, logprobs=0))
        assert reused == (len(prompt) - 1 if turn else 0)
        (text,) = kept(here)
        assert text[:-4] == prompt  # the last token of an answer is not computed
        prompt = [*text, 9]
    here.complete([*SYSTEM, 8, 8, 8], max_tokens=1)
    assert len(kept(here)) == 2


@pytest.mark.parametrize("kind", ["mixtral", "sliding"])
def test_answers_to_one_prompt_compute_it_once(kind: str, serve: Serve) -> None:
    here = serve(kind)
    answer = here.complete(SYSTEM, n=4, max_tokens=5)
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    engine = here.served.engine
    once = prefix.TAIL if engine.stepper.forgets else 1
    assert engine.prefilled == len(SYSTEM) + 3 * once
    assert engine.reused == 3 * (len(SYSTEM) - once)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}  # of the first answer


def test_requests_at_the_same_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share what comes first, part by part, also while it is computed."""
    monkeypatch.setattr(engines, "CHUNK", 32)
    here, plain = serve("mixtral"), serve("mixtral", reuse=False)
    prompts = [[*SYSTEM, 50 + number, 51, 52, *SYSTEM[: 9 * number]] for number in range(6)]
    right = [plain.text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(here.text, prompts)) == right
    engine = here.served.engine
    assert engine.prefilled + engine.reused == sum(map(len, prompts))
    assert engine.reused >= 4 * len(SYSTEM)


def test_what_is_not_reused(serve: Serve) -> None:
    here = serve()
    here.complete(SYSTEM)
    scored = here.complete(SYSTEM, echo=True, logprobs=0, max_tokens=0)
    assert len(scored["choices"][0]["logprobs"]["token_logprobs"]) == len(SYSTEM)
    short = here.complete(SYSTEM[: prefix.GAIN])
    engine = here.served.engine
    assert engine.reused == 0
    for answer in (scored, short):
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert here.complete(SYSTEM[:-1])["usage"]["prompt_tokens_details"]["cached_tokens"] == 148
    assert "moepress_prompt_tokens_reused_total 148.0" in here.client.get("/metrics").text
    assert kept(here)
    for state in engine._kept._states:
        state.images = True
        assert not engine.stepper.reach(state, SYSTEM)


def test_memory_of_kept_texts(serve: Serve) -> None:
    """What answers leave of the caches' memory."""
    stepper = serve().served.engine.stepper

    def size(tokens: int) -> int:
        return stepper.least_bytes + (tokens + room_beyond(tokens)) * stepper.token_bytes

    here = serve(cache=int(2.5 * size(31)))
    texts = [[7 + number, *SYSTEM[:30]] for number in range(4)]
    for text in texts[:3]:
        here.complete(text, max_tokens=1)
    assert kept(here) == texts[1:3]
    here.complete(texts[1], max_tokens=1)  # used again: the other one goes first
    here.complete(texts[3], max_tokens=1)
    assert kept(here) == [texts[1], texts[3]]
    here.complete(texts[0], max_tokens=100)  # may come to need nearly all
    (text,) = kept(here)
    assert text[:31] == texts[0]
    here.complete([9, *SYSTEM, *SYSTEM[:90]], max_tokens=1)  # has more than all
    assert kept(here) == []


def test_a_client_that_left_and_asks_again(serve: Serve) -> None:
    """What was computed of its prompt is there."""
    here = serve()
    engine = here.served.engine
    answer = here.client.post(
        "/v1/completions", json={"prompt": SYSTEM, "max_tokens": 50, "stream": True}
    )
    assert answer.status_code == 200
    assert here.complete([*SYSTEM, 9])["usage"]["prompt_tokens_details"]["cached_tokens"] >= 149
    assert engine.prefilled < 160


def test_a_step_that_fails_leaves_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches may be in any state."""
    here = serve()
    engine = here.served.engine

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine.stepper, "decode", fails)
        body = {"prompt": SYSTEM, "max_tokens": 5}
        assert here.client.post("/v1/completions", json=body).status_code == 500
    assert not kept(here)
    assert said(here.complete(SYSTEM, logprobs=0))[0] == 0
