"""A machine with a pretended card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moepress.kernels import cpu
from tests.card.runtime import pretended
from tests.card.tensors import Card
from tests.kernels.cuda import emulate


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    if emulate.COMPILER is None or cpu.missing() is not None:
        pytest.skip("kernels are emulated with a C++ compiler and the CPU's library")
    with pretended(monkeypatch) as found:
        yield found
