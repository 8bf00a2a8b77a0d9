"""How much memory a user gives, and what follows."""

from __future__ import annotations

import pytest

from moepress.errors import InputError
from moepress.store import memory
from moepress.store.memory import Room, memory_wanted, parse_memory, plan, refuse_bytes, wanted


def test_sizes() -> None:
    assert parse_memory(None) is None
    assert [parse_memory(t) for t in ("12GB", "1.5 gb", "2GiB", "4096", 7)] == [
        12 * 10**9, 1_500_000_000, 2**31, 4096, 7,
    ]  # fmt: skip
    assert [parse_memory(t) for t in ("all", "ALL", "mapped", "fit")] == [
        "all", "all", "mapped", "fit",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "12XB", "1e400", "9" * 40, "nan", True])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="12GB"):
        parse_memory(text)


def test_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    assert wanted() == "mapped"
    monkeypatch.setenv(memory.VARIABLE, "2GB")
    assert wanted() == 2 * 10**9
    with memory_wanted("all"):
        with memory_wanted(None):
            assert wanted() == "all"
        with memory_wanted(5):
            assert wanted() == 5
    monkeypatch.setenv(memory.VARIABLE, "two")
    with pytest.raises(InputError, match="'two'"):
        wanted()


def test_bytes_are_refused_where_nothing_can_stay_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    for given in ((5, None), ("fit", 5)):
        with memory_wanted(*given), pytest.raises(InputError, match="tables of neurons"):
            refuse_bytes("DogeForCausalLM")
    with memory_wanted("fit", "fit"):
        refuse_bytes("DogeForCausalLM")


def test_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)
    assert plan("mapped", 800, 100) is None and plan(500, 0, 100) is None
    assert plan(500, 800, 100) == Room(400, False)
    assert plan(5000, 800, 100) == Room(800, False)
    assert plan("all", 800, 100) == Room(800, True)
    assert plan("fit", 800, 100) is None
    assert plan("fit", 801, 100) == Room(700, False)
    with pytest.raises(InputError, match=r"outside the experts take .* Give more"):
        plan(100, 800, 100)


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    import psutil

    assert 0 < memory.free_host_memory() <= psutil.virtual_memory().total
