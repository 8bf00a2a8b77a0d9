"""What vLLM 0.32 leaves out of some routers: code for CPUs, and a correction bias."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter


def mend_routers(model: nn.Module) -> None:
    """Let vLLM's router for CPUs choose from one group of all experts, which is the same choice.

    Without groups it knows softmax alone: it fails for sigmoid (MiniMax-M2, Laguna), and forgets
    the correction bias and the scale of the routing weights (vLLM 0.32, cpu_router.py).
    """
    for module in model.modules():
        router = module.router if isinstance(module, MoERunner) else None
        if isinstance(router, CPURouter) and _without_groups(router):
            router.use_grouped_topk = True
            router.num_expert_group = router.topk_group = 1


def _without_groups(router: CPURouter) -> bool:
    """Whether the router divides no experts into groups, and does more than softmax."""
    if router.use_grouped_topk or router.custom_routing_function is not None:
        return False
    more = router.e_score_correction_bias is not None or router.routed_scaling_factor != 1
    return router.scoring_func == "sigmoid" or (router.scoring_func == "softmax" and more)


def take_biases(
    model: nn.Module, tensors: Iterator[tuple[str, Tensor]], taken: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Copy correction biases that are stored beside experts; pass on all other tensors.

    vLLM's loader of experts drops them without a word (Laguna).

    Args:
        taken: gets the names of the parameters.
    """
    own = dict(model.named_parameters())
    for name, value in tensors:
        inner = name.replace(".experts.e_score_", ".experts.routed_experts.e_score_")
        if inner != name and inner in own:
            own[inner].data.copy_(value)
            taken.add(inner)
        else:
            yield name, value
