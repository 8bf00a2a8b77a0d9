"""Fixtures of the tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moepress.kernels import cpu
from moepress.kernels.cpu import interface

MISSING = cpu.missing()


@pytest.fixture(params=["portable"] if MISSING else cpu.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the CPU's kernels on each instruction set that was compiled and that this CPU has."""
    if MISSING:
        pytest.skip(f"the library {MISSING}")
    cpu.use(request.param)
    yield request.param
    cpu.use(cpu.instruction_sets()[0])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the library that are called."""
    names: list[str] = []
    call = interface.call

    def counted(name: str, *arguments: Any, **options: Any) -> None:
        names.append(name)
        call(name, *arguments, **options)

    monkeypatch.setattr(interface, "call", counted)
    return names
