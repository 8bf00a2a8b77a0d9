"""Fixtures of the tests of kernels."""

from __future__ import annotations

from typing import Any

import pytest

from moepress.kernels.cpu import interface


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the library that are called."""
    names: list[str] = []
    call = interface.call

    def counted(name: str, *arguments: Any) -> None:
        names.append(name)
        call(name, *arguments)

    monkeypatch.setattr(interface, "call", counted)
    return names
