"""The self test on a pretended card: the kernels of the card, in the emulator."""

from __future__ import annotations

import pytest
import torch

from moepress import self_test as module
from moepress.self_test import self_test
from tests.card.tensors import Card

pytestmark = pytest.mark.card


def test_the_kernels_of_the_card_are_right(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", (1, 9))
    monkeypatch.setattr(module, "MOST", 9)
    monkeypatch.setattr(module.compiler, "compile_all", lambda *_: None)  # no card, no NVRTC
    results = list(self_test(torch.device("cuda", 0)))
    assert [r.wrong for r in results] == [()] * len(results)
    assert sum(r.error > 0 for r in results) >= 5
