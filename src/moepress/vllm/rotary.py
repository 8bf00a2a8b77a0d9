"""What vLLM 0.32's kernel of rotary embeddings for CPUs does to queries that are cut into heads."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def mend_rotary(model: nn.Module) -> None:
    """Let vLLM's PyTorch code rotate queries [T, heads, size], without compiling, on CPUs.

    The kernel takes [T, heads * size]. Of three dimensions it rotates the first T of T * heads
    heads, without a word: DeepSeek's attention and that of LFM2 then write other text, their
    originals too (vLLM 0.32 and 0.33, csrc/cpu/pos_encoding.cpp). Compiled models do not use it.
    """
    module: Any
    for module in model.modules():
        own = getattr(module, "_forward_method", None)
        if own is not None and getattr(own, "__func__", None) is RotaryEmbedding.forward_cpu:
            module._forward_method = partial(_rotate, module)


def _rotate(module: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
    rotate = module.forward_cpu if query.dim() == 2 else module.forward_native
    return rotate(positions, query, key)
