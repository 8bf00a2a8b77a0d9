"""Shapes of models that stages and scored sequences are counted from."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepress.original.source import Source
from moepress.workload.shapes import ModelShape
from tests.families.models import make_model, save_model
from tests.families.sizes import CHOSEN, EXPERTS


@pytest.mark.parametrize("family", ["aria_text", "dbrx", "gemma4_text", "mixtral"])
def test_the_share_of_the_experts_that_a_token_chooses(family: str, tmp_path: Path) -> None:
    """Whatever the config calls their number."""
    shape = ModelShape.of(Source(save_model(make_model(family), tmp_path)))
    assert shape.used == CHOSEN / EXPERTS != 8 / EXPERTS
