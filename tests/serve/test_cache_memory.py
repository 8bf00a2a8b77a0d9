"""The memory that keys and values may take, if nobody says it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moepress.serve import model as models
from moepress.serve.limits import Limits
from tests.conftest import make_model

FREE = 10_000_000


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with `FREE` bytes, and a process of 5 MB of which `shared` are pages of files."""
    used = SimpleNamespace(rss=5_000_000, shared=0)
    monkeypatch.setattr(models, "free_host_memory", lambda: FREE)
    monkeypatch.setattr(models.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))
    return used


def test_mapped_weights_are_not_free_memory(machine: Any) -> None:
    net = make_model("mixtral")
    weights = sum(x.nbytes for x in (*net.parameters(), *net.buffers()))
    assert weights < machine.rss
    assert models.cache_of(net, Limits()) == FREE // 2
    machine.shared = machine.rss  # all of them are pages of files, which count as free
    assert models.cache_of(net, Limits()) == (FREE - weights) // 2
    del machine.shared  # a system that does not say it
    assert models.cache_of(net, Limits()) == FREE // 2
    assert models.cache_of(net, Limits(cache=7)) == 7


@pytest.mark.parametrize(("budget", "left"), [(4_000_000, 3_500_000), (9_000_000, FREE // 8)])
def test_experts_that_a_store_will_hold(
    budget: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory that the weights do not leave, keys and values get an eighth."""
    store = SimpleNamespace(budget=budget, counts=lambda: SimpleNamespace(bytes_held=1_000_000))
    monkeypatch.setattr(models, "store_of", lambda model: store)
    assert models.cache_of(make_model("mixtral"), Limits()) == left
