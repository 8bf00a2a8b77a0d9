"""Shapes of models that stages and scored sequences are counted from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moepress.estimate import task_of
from moepress.original.source import Source
from moepress.request import Request
from moepress.workload import disk
from moepress.workload.shapes import ModelShape
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.families.sizes import CHOSEN, EXPERTS


@pytest.mark.parametrize("family", ["aria_text", "dbrx", "gemma4_text", "mixtral"])
def test_the_share_of_the_experts_that_a_token_chooses(family: str, tmp_path: Path) -> None:
    """Whatever the config calls their number."""
    shape = ModelShape.of(Source(save_model(make_model(family), tmp_path)))
    assert shape.used == CHOSEN / EXPERTS != 8 / EXPERTS


@pytest.mark.parametrize(
    ("family", "state", "layers"),
    [
        ("mixtral", 0, ()),
        ("granitemoehybrid", 0, (0, 2)),
        ("jamba", 0, (0, 2)),
        ("kimi_linear", 4 * 16 * 16, (0,)),
        ("nemotron_h", 8 * 16 * 16, (0,)),
        ("qwen3_next", 0, (0,)),
    ],
)
def test_layers_with_a_state(
    family: str, state: int, layers: tuple[int, ...], tmp_path: Path
) -> None:
    shape = ModelShape.of(Source(save_model(make_model(family), tmp_path)))
    states = {number: layer.state for number, layer in enumerate(shape.layers) if layer.state}
    assert tuple(states) == layers and (not state or set(states.values()) == {state})


def test_heads_of_latent_attention(tmp_path: Path) -> None:
    """Queries have a part with positions and one without; values have a size of their own."""
    model = make_model("deepseek_v3")
    config = model.config
    shape = ModelShape.of(Source(save_model(model, tmp_path)))
    assert shape.head == config.qk_nope_head_dim + config.qk_rope_head_dim
    assert shape.value_head == config.v_head_dim != shape.head


def test_inputs_of_a_very_wide_down_are_a_temporary_file(tmp_path: Path) -> None:
    folder = save_model(make_model("mixtral"), tmp_path)
    task = task_of(Request.of(folder, small_recipe(tmp_path, "default"), "cpu", False))
    assert disk.temporary(task) == 0
    wide = replace(task, shape=replace(task.shape, intermediate=1 << 22))
    own = 6 * 32 * CHOSEN // EXPERTS
    assert disk.temporary(wide) == own * (1 << 22) * 4 > 1 << 30
