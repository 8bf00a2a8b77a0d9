"""Who learns a step late that a text has ended. tests/card/test_captured.py writes such texts."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.generation import utils

from moepress.hf.late_stops import late_stops

CUDA, CPU, MPS = (torch.device(name) for name in ("cuda", "cpu", "mps"))

if not hasattr(utils, "DeferredStopCheck"):
    pytest.skip("this transformers reads after every token", allow_module_level=True)


def late(device: torch.device = CUDA, kept: bool = False, assistant: bool = False) -> bool:
    """What transformers' `generate` finds out after a prompt."""
    found: bool = utils.DeferredStopCheck.is_supported(device, None, kept, is_assistant=assistant)
    return found


def yes() -> bool:
    return True


def test_only_inside_and_only_tokens_of_that_device() -> None:
    assert not late() and late(MPS)
    with late_stops("cuda", yes):
        assert late() and not late(CPU) and late(MPS)
        with late_stops("cpu", yes):
            assert not late() and not late(CPU)  # a CPU has no events
        assert late()
    assert not late()


def test_not_where_a_cache_is_kept_or_nobody_wants_it() -> None:
    wanted = [True]
    with late_stops("cuda", lambda: wanted[0]):
        assert late() and not late(kept=True) and not late(assistant=True)
        wanted[0] = False
        assert not late()


def test_other_threads_and_errors() -> None:
    found = []
    with pytest.raises(KeyError), late_stops("cuda", yes):
        thread = threading.Thread(target=lambda: found.append(late()))
        thread.start()
        thread.join()
        raise KeyError
    assert found == [False] and not late()


def test_requests_end_in_any_order() -> None:
    wanted = {"first": False, "second": True}
    questions = [lambda: wanted["first"], lambda: wanted["second"]]
    first, second = (late_stops("cuda", question) for question in questions)
    alive = [weakref.ref(question) for question in questions]
    first.__enter__()
    second.__enter__()
    assert late()
    first.__exit__(None, None, None)
    assert late()  # for the second
    wanted["first"] = True
    second.__exit__(None, None, None)
    assert not late()
    del first, second, questions
    gc.collect()
    assert [question() for question in alive] == [None, None]  # nor the model that they may hold


def test_a_request_that_another_thread_ends() -> None:
    with ThreadPoolExecutor(1) as other:
        request = late_stops("cuda", yes)
        other.submit(request.__enter__).result()
        with late_stops("cuda", yes):
            assert other.submit(late).result()
            request.__exit__(None, None, None)
            assert late() and not other.submit(late).result()
    assert not late()


def test_a_release_that_asks_otherwise_decides_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    check = type("Check", (), {"is_supported": staticmethod(lambda device: device is MPS)})
    monkeypatch.setattr(utils, "DeferredStopCheck", check)
    asked: Callable[..., bool] = check.is_supported  # type: ignore[attr-defined]
    with late_stops("cuda", yes):
        assert check.is_supported is not asked  # type: ignore[attr-defined]
        assert [check.is_supported(d) for d in (CUDA, MPS)] == [False, True]  # type: ignore[attr-defined]
