"""Answers computed together are those computed alone."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.serve import engine as engines
from moepress.serve import stepping
from moepress.serve.limits import Limits
from moepress.serve.sampling import Settings
from moepress.serve.stepping import Stepper
from moepress.serve.work import Job, Prompt, Wanted
from tests.conftest import FAMILIES, make_model
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.conftest import Here, serving

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip


def model(kind: str) -> Any:
    if kind == "linear":
        return make_model("qwen3_next", **LINEAR)
    if kind == "sliding":
        return make_model("qwen2_moe", use_sliding_window=True, max_window_layers=0, **SLIDING)
    return make_model(kind)


@torch.inference_mode()
def whole(net: Any, ids: list[int]) -> Tensor:
    """The oracle: logits after a text, in one call without a cache."""
    return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [*FAMILIES, "sliding", "linear"])
def test_steps_of_a_batch_whose_members_join_and_leave(kind: str) -> None:
    net = model(kind)
    stepper = Stepper(net)
    assert stepper.batches and stepper.chunks
    assert stepper.token_bytes > 0
    texts = [list(range(3, 3 + length)) for length in (21, 2, 9)]
    states = [stepper.new() for _ in texts]
    for state, text in zip(states, texts, strict=True):
        cut = len(text) // 2
        for part in (text[:cut], text[cut:]):
            if part:
                logits = stepper.prefill(state, part)
        torch.testing.assert_close(logits, whole(net, text), rtol=1e-3, atol=2e-3)
    for step, members in enumerate([(0, 1), (0, 1), (0, 1, 2), (2, 1), (1,), (1, 2, 0)]):
        tokens = [(50 + 7 * step + member) for member in members]
        logits = stepper.decode([states[member] for member in members], tokens)
        for row, member, token in zip(logits, members, tokens, strict=True):
            texts[member].append(token)
            torch.testing.assert_close(row, whole(net, texts[member]), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("far", [2, 100])
def test_trials_that_are_far(far: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to two pairs of texts may be: a model that is wrong is far with all."""
    net = make_model("mixtral")
    calls, stepped = itertools.count(), Stepper.decode

    def decode(self: Stepper, states: list[stepping.State], ids: list[int]) -> torch.Tensor:
        logits = stepped(self, states, ids)
        return logits.flip(-1) if len(states) > 1 and next(calls) < far else logits

    monkeypatch.setattr(Stepper, "decode", decode)
    stepper = Stepper(net)
    assert stepper.chunks and stepper.batches == (far == 2)
    assert next(calls) == 3


def test_a_long_text_is_not_computed_with_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [100_000, 5, 60_000, 9, *range(1, 100)]
    groups = stepping.grouped(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert groups[0] == [0, 2] and len(groups) == 3
    assert stepping.grouped([5, 900, 7]) == [[1, 2, 0]]  # small: together
    assert stepping.grouped([5, 900], batches=False) == [[0], [1]]
    net = make_model("mixtral")
    stepper = Stepper(net)
    monkeypatch.setattr(stepping, "SMALL", 0)
    texts = [[5], list(range(3, 60)), [8, 9], list(range(9, 60))]
    states = [stepper.new() for _ in texts]
    for state, text in zip(states, texts, strict=True):
        stepper.prefill(state, text)
    assert stepping.grouped([state.length for state in states]) == [[1, 3], [2, 0]]
    for row, text in zip(stepper.decode(states, [9] * 4), texts, strict=True):
        torch.testing.assert_close(row, whole(net, [*text, 9]), rtol=1e-3, atol=2e-3)


def test_a_model_whose_cache_is_unknown_is_computed_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stepping, "can_batch", lambda cache: False)
    net = make_model("mixtral")
    stepper = Stepper(net)
    assert not stepper.batches
    states = [stepper.new(), stepper.new()]
    texts = [[5, 6, 7], [8]]
    for state, text in zip(states, texts, strict=True):
        stepper.prefill(state, text)
    logits = stepper.decode(states, [9, 9])
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, whole(net, [*text, 9]), rtol=1e-3, atol=2e-3)


def test_a_batch_that_goes_wrong_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from moepress.serve import rows

    stacked = rows._stacked
    monkeypatch.setattr(rows, "_stacked", lambda parts: stacked(parts).flip(2))
    assert not Stepper(make_model("mixtral")).batches


def test_many_at_once_get_their_own_answers(here: Here) -> None:
    prompts = [f"def f{i}(x):" + " x" * (i % 7) for i in range(12)]

    def ask(prompt: str) -> str:
        return here.text(prompt, max_tokens=20)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [here.alone(prompt, 20) for prompt in prompts]


def test_long_prompts_come_in_parts_and_others_go_on(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHUNK", 16)
    here = serving(chat_folder, Limits(concurrent=3))
    calls: list[tuple[str, int]] = []
    stepper = here.served.engine.stepper
    prefill, decode = stepper.prefill, stepper.decode

    def watched(state: Any, ids: Any, *args: Any, **options: Any) -> Tensor:
        calls.append(("prompt", len(ids)))
        return prefill(state, ids, *args, **options)

    def watched_decode(states: Any, ids: Any) -> Tensor:
        calls.append(("step", len(ids)))
        return decode(states, ids)

    monkeypatch.setattr(stepper, "prefill", watched)
    monkeypatch.setattr(stepper, "decode", watched_decode)
    long = " x" * 180
    thread = threading.Thread(target=lambda: long_text.append(here.text(long, max_tokens=2)))
    long_text: list[str] = []
    short = threading.Thread(target=lambda: here.text("def", max_tokens=30))
    short.start()
    while not calls:
        pass
    thread.start()
    thread.join(60)
    short.join(60)
    assert here.served.engine.stop(30)
    assert max(size for kind, size in calls if kind == "prompt") <= 16
    parts = [at for at, (kind, size) in enumerate(calls) if (kind, size) == ("prompt", 16)]
    assert any(("step", 1) in calls[a:b] for a, b in pairwise(parts))
    assert long_text == [here.alone(long, 2)]


def test_memory_of_caches_bounds_what_runs(chat_folder: Path) -> None:
    here = serving(chat_folder, Limits(cache=1))  # byte: only one at a time
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: here.text(f"def f{i}"), range(4)))
    assert answers == [here.alone(f"def f{i}", 8) for i in range(4)]
    engine = here.served.engine
    assert engine.cache == 1 and engine.stop(30)


class Still:
    """A stepper that computes nothing: tests say when an answer is done."""

    least_bytes = 0
    token_bytes = 1
    begins = forgets = False
    reach = None

    def keep_within(self, budget: int) -> None:
        pass

    def new(self) -> stepping.State:
        return stepping.State(None)


@pytest.fixture
def queue() -> Iterator[Callable[[int], int]]:
    """Ask for a number of answers, and then do one of those that wait: the number of its request.

    The engine has no thread here, and room for one answer.
    """
    engine = engines.Engine(Still(), llama_tokenizer(), (), Limits(concurrent=1), 1000)  # type: ignore[arg-type]
    loop = asyncio.new_event_loop()
    jobs: list[Job] = []

    def turn(answers: int) -> int:
        if answers:
            jobs.append(Job([Prompt((5,))] * answers, Wanted(Settings(), 1), loop, math.inf))
            engine._take(jobs[-1])
        engine._admit()
        return jobs.index(engine._prompts.popleft().job)

    yield turn
    loop.close()


def test_later_answers_of_a_request_come_too(queue: Callable[[int], int]) -> None:
    """Though as many come as are done."""
    done = [queue(3), *(queue(1) for _ in range(50))]
    assert [at for at, number in enumerate(done) if number == 0] == [0, 1, 3]
    assert [number for number in done if number] == list(range(1, 49))
    larger = [queue(40), *(queue(1) for _ in range(2000))]
    assert larger.count(51) == 40


def test_nobody_waits_for_all_of_a_large_request(queue: Callable[[int], int]) -> None:
    done = [queue(40), queue(1), queue(1), *(queue(0) for _ in range(39))]
    assert done[:5] == [0, 0, 1, 0, 2] and done.count(0) == 40


def test_stop_ends_all_answers(chat_folder: Path) -> None:
    here = serving(chat_folder, Limits())
    codes: list[int] = []

    def ask() -> None:
        body = {"prompt": "x", "max_tokens": 200, "n": 40}
        codes.append(here.client.post("/v1/completions", json=body).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    engine = here.served.engine
    while not engine.generated:
        pass
    assert engine.stop(30)
    thread.join(60)
    assert codes == [503] and engine.trouble() == "stopped"
    assert here.client.get("/health").status_code == 503
    assert here.client.post("/v1/completions", json={"prompt": "x"}).status_code in (500, 503)


def test_a_fault_of_the_engine_is_not_called_a_stop(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients ask again after 503: here nobody would answer."""
    here = serving(chat_folder, Limits())

    def fault() -> None:
        raise RuntimeError("of the engine")

    monkeypatch.setattr(here.served.engine, "_admit", fault)
    answer = here.client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 500 and "stopping" not in answer.text
    assert here.client.get("/health").json() == {"status": "unhealthy", "reason": "stopped"}
