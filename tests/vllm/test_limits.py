"""What vLLM cannot run is refused before a weight is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from moepress.errors import InputError

pytestmark = pytest.mark.vllm


def test_ranks_on_cpus() -> None:
    from vllm.config import CompilationMode

    from moepress.vllm.limits import check_ranks

    def config(pipeline: int, data: int, mode: CompilationMode) -> Any:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=pipeline, data_parallel_size=data
            ),
            compilation_config=SimpleNamespace(mode=mode),
        )

    with pytest.raises(InputError, match="--pipeline-parallel-size with compiled models only"):
        check_ranks(config(2, 1, CompilationMode.NONE))
    with pytest.raises(InputError, match="cannot run experts with --data-parallel-size"):
        check_ranks(config(1, 2, CompilationMode.VLLM_COMPILE))
    check_ranks(config(1, 1, CompilationMode.NONE))
    check_ranks(config(2, 1, CompilationMode.VLLM_COMPILE))


def test_models_that_vllm_cannot_run() -> None:
    from moepress.vllm.limits import FAILS, check_layers

    own: Any = nn.Identity()
    own.config = SimpleNamespace(model_type="mixtral")
    check_layers(nn.Identity(), own)
    for kind, what in FAILS.items():
        own.config = SimpleNamespace(model_type=kind)
        with pytest.raises(InputError, match=f"with {kind}.*{what}.*moepress serve"):
            check_layers(nn.Identity(), own)


def test_fields_that_vllm_would_guess() -> None:
    from moepress.vllm.limits import check_layers

    own: Any = nn.Identity()
    own.config = SimpleNamespace(model_type="deepseek_v3")
    with pytest.raises(InputError, match=r"no scoring_func 'sigmoid'.*--hf-overrides"):
        check_layers(nn.Identity(), own)
    model: Any = nn.Identity()
    model.config = SimpleNamespace(model_type="deepseek_v3", scoring_func="sigmoid")
    check_layers(model, own)
