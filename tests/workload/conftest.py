"""Sums of a fit are computed by torch here: FlopCount does not see compiled ones."""

from __future__ import annotations

import pytest

from moepress.rounding import fit


@pytest.fixture(autouse=True)
def plain_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_sums", fit.plain_sums)
