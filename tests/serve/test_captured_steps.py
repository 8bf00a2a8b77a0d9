"""Which steps of a server are replayed, and what is left of that when it ends.

`tape` takes the place of CUDA graphs; tests/card/test_captured.py has such steps on a card.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.hf import late_stops
from moepress.hf.captured import PROOFS, ROOM, STEP, CapturedSteps, room_for
from moepress.hf.cuda_graph import Graph
from moepress.serve import stepping
from moepress.serve.limits import Limits
from moepress.serve.stepping import BESIDE, Stepper
from tests.conftest import make_model
from tests.hf.tape import tape
from tests.serve.conftest import Here, serving


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Those that steppers capture from now on."""
    made: list[Graph] = []

    def capture(work: Callable[[], Tensor], device: torch.device) -> Graph:
        made.append(tape(work, device))
        return made[-1]

    def steps(model: Any) -> CapturedSteps:
        return CapturedSteps(model, capture=capture, devices=("cpu",))

    monkeypatch.setattr(stepping, "CapturedSteps", steps)
    return made


@torch.inference_mode()
def whole(net: Any, ids: list[int]) -> Tensor:
    """The oracle: logits after each token of a text, in one call without a cache."""
    return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def replaced(model: Any) -> bool:
    """Whether a model's steps are replayed now."""
    return "forward" in vars(model)


def test_the_cache_of_a_captured_step_takes_an_eighth_of_the_budget(graphs: list[Graph]) -> None:
    net = make_model("mixtral")
    stepper = Stepper(net)
    last = STEP  # after one more token a step would get room for another STEP tokens
    text = [5 + token % 32 for token in range(last - 4)]
    eighth = stepper.least_bytes + room_for(last) * stepper.token_bytes
    stepper.keep_within(BESIDE * eighth)
    state = stepper.new()
    stepper.prefill(state, text)
    found = []
    for token in range(40, 48):
        text.append(token)
        logits = stepper.decode([state], [token])[0]
        found.append(replaced(net))
        torch.testing.assert_close(logits, whole(net, text)[-1], rtol=1e-3, atol=2e-3)
    assert found == [True] * (4 + 1) + [False] * 3
    step = stepper.steps._step
    assert step is not None
    assert sum(x.nbytes for la in step.cache.layers for x in (la.keys, la.values)) == eighth
    stepper.keep_within(BESIDE * ROOM * stepper.token_bytes)  # no step has room for so few tokens
    assert stepper.steps._step is None
    stepper.close()


@pytest.mark.parametrize("share", [0.9, 40.0])
def test_the_engine_names_its_budget(chat_folder: Path, graphs: list[Graph], share: float) -> None:
    """share: of the caches' budget, for the least cache of a step times `BESIDE`."""
    token = Stepper(make_model("mixtral")).token_bytes
    here = serving(chat_folder, Limits(cache=int(share * BESIDE * room_for(1) * token)))
    before = len(graphs)
    text = here.text(max_tokens=12)
    engine = here.served.engine
    assert engine.stop(30)
    assert (engine.stepper.steps.replayed > 0) == (share > 1)
    assert len(graphs) == before  # the one of the trial fits
    assert text == here.alone("def f1(x):", 12)


def test_prompts_are_not_replayed(graphs: list[Graph]) -> None:
    """The last part of a prompt may be one token. An answer goes on meanwhile."""
    net = make_model("mixtral")
    stepper = Stepper(net)
    state, text = stepper.new(), list(range(5, 17))
    stepper.prefill(state, text)

    def step(token: int) -> None:
        text.append(token)
        logits = stepper.decode([state], [token])[0]
        assert replaced(net)
        torch.testing.assert_close(logits, whole(net, text)[-1], rtol=1e-3, atol=2e-3)

    for number in range(PROOFS):
        step(30 + number)
    captured, replayed = len(graphs), stepper.steps.replayed
    for number in range(4):
        prompt, other = list(range(50 + number, 59 + number)), stepper.new()
        scored = [stepper.prefill(other, prompt[:8], all_logits=True)]
        step(40 + 2 * number)
        scored.append(stepper.prefill(other, prompt[8:], all_logits=True))
        assert not replaced(net)
        step(41 + 2 * number)
        torch.testing.assert_close(torch.cat(scored), whole(net, prompt), rtol=1e-3, atol=2e-3)
    assert len(graphs) == captured
    assert stepper.steps.replayed == replayed + 2 * 4  # the answer is not loaded anew
    stepper.close()


@contextmanager
def going(here: Here) -> Iterator[None]:
    """Meanwhile a request of one answer runs, whose steps are replayed."""
    engine = here.served.engine
    engine.ends = frozenset()
    body = {"prompt": "def f1(x):", "max_tokens": 180, "temperature": 0}
    asking = Thread(target=lambda: here.client.post("/v1/completions", json=body))
    before, end = engine.stepper.steps.replayed, time.monotonic() + 30
    asking.start()
    while engine.stepper.steps.replayed == before and time.monotonic() < end:
        time.sleep(0.001)
    assert replaced(engine.stepper.model)
    yield
    asking.join(30)
    assert not asking.is_alive()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_as_before_when_its_engine_ends(
    chat_folder: Path, graphs: list[Graph], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = serving(chat_folder, Limits())
    engine = here.served.engine

    def fault() -> None:
        raise RuntimeError("a fault of the engine")

    with going(here):
        if fails:
            monkeypatch.setattr(engine, "_sweep", fault)
            engine._thread.join(30)
        else:
            assert engine.stop(30)
        assert engine.trouble() == "stopped" and 0 < engine.generated < 180
    model = engine.stepper.model
    assert not replaced(model)
    before = len(graphs)
    stepper = Stepper(model)  # of a server that comes after
    assert len(graphs) == before + 1 and stepper.steps.refused is None


def test_a_model_is_as_before_when_the_trial_is_interrupted(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(got: Tensor, expected: Tensor) -> float:
        assert replaced(net)
        raise KeyboardInterrupt

    monkeypatch.setattr(stepping, "distance", interrupted)
    net = make_model("mixtral")
    with pytest.raises(KeyboardInterrupt):
        Stepper(net)
    assert not replaced(net) and not late_stops._requests()


def test_another_thread_takes_over(graphs: list[Graph]) -> None:
    net = make_model("mixtral")
    stepper = Stepper(net)
    state, text = stepper.new(), list(range(5, 17))
    stepper.prefill(state, text)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        asked = []
        for thread, token in ((one, 7), (two, 8), (one, 9)):
            text.append(token)
            logits = thread.submit(stepper.decode, [state], [token]).result()[0]
            torch.testing.assert_close(logits, whole(net, text)[-1], rtol=1e-3, atol=2e-3)
            asked.append([len(pool.submit(late_stops._requests).result()) for pool in (one, two)])
        stepper.close()  # from a third
        asked.append([len(pool.submit(late_stops._requests).result()) for pool in (one, two)])
    assert asked == [[1, 0], [0, 1], [1, 0], [0, 0]] and not replaced(net)
