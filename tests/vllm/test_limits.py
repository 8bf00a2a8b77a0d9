"""What vLLM cannot run is refused before a weight is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("vllm")

from vllm.config import CompilationMode

from moepress.errors import InputError
from moepress.vllm.limits import OTHER_TEXT, check_layers, check_pipeline

pytestmark = pytest.mark.vllm


def config(ranks: int, mode: CompilationMode) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=ranks),
        compilation_config=SimpleNamespace(mode=mode),
    )


def test_a_pipeline_on_cpus_is_compiled() -> None:
    with pytest.raises(InputError, match="--pipeline-parallel-size with compiled models only"):
        check_pipeline(config(2, CompilationMode.NONE))
    check_pipeline(config(1, CompilationMode.NONE))
    check_pipeline(config(2, CompilationMode.VLLM_COMPILE))


@pytest.mark.parametrize("kind", OTHER_TEXT)
def test_models_with_other_text(kind: str) -> None:
    own: Any = nn.Identity()
    own.config = SimpleNamespace(model_type="mixtral")
    check_layers(nn.Identity(), own)
    own.config = SimpleNamespace(model_type=kind)
    with pytest.raises(InputError, match=f"other text with {kind} .*moepress serve"):
        check_layers(nn.Identity(), own)
