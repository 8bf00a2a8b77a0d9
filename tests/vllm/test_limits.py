"""What vLLM cannot run is refused before a weight is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from moepress.errors import InputError

pytestmark = pytest.mark.vllm


def test_a_pipeline_on_cpus_is_compiled() -> None:
    from vllm.config import CompilationMode

    from moepress.vllm.limits import check_pipeline

    def config(ranks: int, mode: CompilationMode) -> Any:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(pipeline_parallel_size=ranks),
            compilation_config=SimpleNamespace(mode=mode),
        )

    with pytest.raises(InputError, match="--pipeline-parallel-size with compiled models only"):
        check_pipeline(config(2, CompilationMode.NONE))
    check_pipeline(config(1, CompilationMode.NONE))
    check_pipeline(config(2, CompilationMode.VLLM_COMPILE))


def test_models_that_vllm_cannot_run() -> None:
    from moepress.vllm.limits import FAILS, OTHER_TEXT, check_layers

    own: Any = nn.Identity()
    own.config = SimpleNamespace(model_type="mixtral")
    check_layers(nn.Identity(), own)
    for kind, what in {**OTHER_TEXT, **FAILS}.items():
        own.config = SimpleNamespace(model_type=kind)
        with pytest.raises(InputError, match=f"with {kind}.*{what}.*moepress serve"):
            check_layers(nn.Identity(), own)
