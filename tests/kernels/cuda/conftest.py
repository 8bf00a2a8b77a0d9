"""The functions of moepress.kernels.cuda on CPU tensors: kernels run in the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moepress.kernels.cuda import launch as launching
from tests.kernels.cuda import emulate


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN: what a kernel must write and does not shows up."""
    launcher = launching.Launcher(emulate.launch, multiprocessors=8)
    monkeypatch.setitem(launching.LAUNCHERS, "cpu", lambda device: launcher)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
