"""What vLLM 0.32 cannot run, whatever the weights: said at load, not by a failing request."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.platforms import current_platform

from moepress.errors import InputError

# Model types that fail while vLLM starts, the originals too.
FAILS = {
    "axk2": "vLLM's Transformers backend gives its attention no mask, which the attention reads",
}
# Fields of a model type's original for which vLLM takes another value where they are missing.
WANTED = {"deepseek_v3": {"scoring_func": "sigmoid"}}


def check_ranks(config: Any) -> None:
    """Raise InputError for ranks that vLLM cannot run on CPUs.

    Those of a pipeline, if models are not compiled: vLLM makes the buffers between them while it
    warms up compiled models. Those that divide requests: its communicator for CPUs has no
    `all_gatherv`, with which they exchange the tokens of experts.
    """
    if not current_platform.is_cpu():
        return
    ranks = config.parallel_config
    eager = config.compilation_config.mode == CompilationMode.NONE
    if ranks.pipeline_parallel_size > 1 and eager:
        raise InputError(
            "vLLM on CPUs runs --pipeline-parallel-size with compiled models only. Leave out "
            "--enforce-eager, or use --tensor-parallel-size."
        )
    if ranks.data_parallel_size > 1:
        raise InputError(
            "vLLM on CPUs cannot run experts with --data-parallel-size. Use "
            "--tensor-parallel-size, or start several servers."
        )


def check_layers(model: nn.Module, own: nn.Module) -> None:
    """Raise InputError for layers that vLLM replaces, has no kernels for, or computes otherwise.

    Args:
        model: of vLLM's class.
        own: of transformers' class.
    """
    kind = getattr(own.config, "model_type", "")
    if kind in FAILS:
        raise InputError(
            f"vLLM 0.32 does not start with {kind}: {FAILS[kind]}. `moepress serve` can serve the "
            "folder."
        )
    config = getattr(model, "config", own.config)  # with the fields of --hf-overrides
    for field, value in WANTED.get(kind, {}).items():
        if getattr(config, field, None) != value:
            raise InputError(
                f"config.json of this {kind} has no {field} '{value}', as originals on the hub "
                "have. vLLM would take another one and write other text: add "
                f'--hf-overrides \'{{"{field}": "{value}"}}\'.'
            )
    _check_replaced(model, own)
    _check_kernels(model)


def _check_kernels(model: nn.Module) -> None:
    """vLLM's build for CPUs has no kernels for some layers."""
    for module in model.modules():
        lacking = _lacking(module)
        if lacking is not None:
            raise InputError(f"This build of vLLM cannot run {type(model).__name__}: {lacking}.")


def _lacking(module: nn.Module) -> str | None:
    """What vLLM's build lacks for a module, and what to do; None: nothing."""
    ours = "`moepress serve` can serve the folder"
    if isinstance(module, MambaMixer) and not hasattr(torch.ops._C, "selective_scan_fwd"):
        return f"it has no kernel for Mamba layers. {ours}"
    router = module.router if isinstance(module, MoERunner) else None
    if isinstance(router, ZeroExpertRouter) and not hasattr(torch.ops._moe_C, "topk_softmax"):
        return f"it has no kernel for routers with experts that do nothing. {ours}"
    if type(module).__name__ == "Llama4VisionModel" and current_platform.is_cpu():
        text = "--limit-mm-per-prompt '{\"image\": 0}' serves text"
        return f"linears of its images fail on CPUs. {text}, {ours}, images too"
    return None


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
