"""What vLLM 0.32 cannot run, whatever the weights: said at load, not by a failing request."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.platforms import current_platform

from moepress.errors import InputError

# Model types whose text is not that of transformers, measured in docs/vllm.md.
OTHER_TEXT = {
    "lfm2_moe": "so it does with the original",
    "axk1": "the cause is not known",
}
# Model types that fail while vLLM starts, the originals too.
FAILS = {
    "axk2": "vLLM's Transformers backend gives its attention no mask, which the attention reads",
}


def check_pipeline(config: Any) -> None:
    """Raise InputError for a pipeline of ranks on CPUs that is not compiled.

    vLLM makes the buffers between ranks while it warms up, on CPUs for compiled models only.
    """
    if config.parallel_config.pipeline_parallel_size == 1 or not current_platform.is_cpu():
        return
    if config.compilation_config.mode == CompilationMode.NONE:
        raise InputError(
            "vLLM on CPUs runs --pipeline-parallel-size with compiled models only. Leave out "
            "--enforce-eager, or use --tensor-parallel-size."
        )


def check_layers(model: nn.Module, own: nn.Module) -> None:
    """Raise InputError for layers that vLLM replaces, has no kernels for, or computes otherwise.

    Args:
        model: of vLLM's class.
        own: of transformers' class.
    """
    kind = getattr(own.config, "model_type", "")
    if kind in OTHER_TEXT:
        raise InputError(
            f"vLLM 0.32 writes other text with {kind} than transformers ({OTHER_TEXT[kind]}). "
            "`moepress serve` can serve the folder."
        )
    if kind in FAILS:
        raise InputError(
            f"vLLM 0.32 does not start with {kind}: {FAILS[kind]}. `moepress serve` can serve the "
            "folder."
        )
    _check_replaced(model, own)
    if any(isinstance(module, MambaMixer) for module in model.modules()) and not hasattr(
        torch.ops._C, "selective_scan_fwd"
    ):
        raise InputError(
            f"This build of vLLM has no kernel for the Mamba layers of {type(model).__name__}. "
            "`moepress serve` can serve the folder."
        )


def _check_replaced(model: nn.Module, own: nn.Module) -> None:
    """vLLM's Transformers backend replaces linears, also those of a class that does more."""
    from vllm.model_executor.models.transformers.base import Base

    if not isinstance(model, Base):
        return
    replaced = {name for name, module in model.named_modules() if isinstance(module, LinearBase)}
    for name, module in own.named_modules():
        more = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if more and name in replaced:
            raise InputError(
                f"vLLM has no class for {type(own).__name__}, and its Transformers backend "
                f"replaces {name}, a {type(module).__name__}, by a plain linear. `moepress serve` "
                "can serve the folder. So can vLLM if the original's config.json named another "
                "class that it has: --hf-overrides '{\"architectures\": [...]}'."
            )
