"""Attention of one token on a CPU: queries that share keys are multiplied together.

In decoding without padding there is no mask. transformers then leaves grouped-query attention to
PyTorch, whose CPU kernel takes the queries one by one: 15 ms a layer at 4096 tokens of context, 32
heads and 4 groups, in bfloat16. With a mask transformers lets the queries of a group be rows of one
product: 1 ms (docs/log.md#grouped-attention). So a mask that hides nothing is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MASK = "attention_mask"


def group_queries(model: nn.Module) -> None:
    """Have the attention of a model on a CPU multiply the queries of a group together.

    Only calls with one token and without a mask change. Nothing changes if transformers does not
    pack such queries (releases before `pack_gqa`). Safe to repeat.
    """
    from transformers.integrations import sdpa_attention

    if not hasattr(sdpa_attention, "pack_gqa"):
        return
    for module in model.modules():
        groups = getattr(module, "num_key_value_groups", 1)
        grouped = isinstance(groups, int) and groups > 1 and hasattr(module, "config")
        if grouped and _add_mask not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_add_mask, with_kwargs=True)


def _add_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before an attention module runs: a mask that every query sees all keys through.

    It is [1, 1, 1, 1], for any number of keys. A compiled model keeps what it has: there,
    transformers repeats keys where there is a mask.
    """
    if MASK not in kwargs or kwargs[MASK] is not None or torch.compiler.is_compiling():
        return None
    states = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[1] != 1:
        return None
    config: Any = module.config
    if not states.is_cpu or config._attn_implementation != "sdpa":
        return None
    return args, kwargs | {MASK: torch.ones(1, 1, 1, 1, dtype=torch.bool)}
