"""What vLLM 0.32 leaves out of some heads: their bias."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor


def mend_heads(model: nn.Module) -> None:
    """Add the bias of a head to its outputs where vLLM's class loads one and does not use it.

    Phi-MoE's does so (vLLM 0.32 and 0.33, phimoe.py), with its original too.
    """
    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.register_forward_pre_hook(_with_bias, with_kwargs=True)


def _with_bias(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The arguments of a `LogitsProcessor`: head, hidden states, and a bias that may be missing."""
    if len(args) != 2 or named.get("embedding_bias") is not None:
        return None
    return args, named | {"embedding_bias": getattr(args[0], "bias", None)}
