"""vLLM's quantization config for compressed folders: which method each layer gets."""

from __future__ import annotations

from typing import Any

import torch
import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from moepress.format.checkpoint import QUANT_METHOD
from moepress.vllm.versions import check_version


class MoePressVllmConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not seen by mypy
    """The `quantization_config` of a compressed folder's config.json (docs/format.md)."""

    def __init__(self, fields: dict[str, Any]) -> None:
        from moepress.hf import MoePressConfig

        super().__init__()
        self.checked = MoePressConfig(**fields)  # raises InputError for what it cannot read

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoePressVllmConfig:
        check_version(vllm.__version__)
        return cls(config)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # as of our CUDA kernels, docs/cuda.md

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; None: vLLM's own for plain weights.

        Linears and embeddings get ours whether the folder packs them or not: that is known when
        their weights arrive.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from moepress.vllm.experts import ExpertsMethod
        from moepress.vllm.linears import LinearMethod

        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(layer.moe_config)
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            return LinearMethod()
        return None


def register() -> None:
    """Register config and loader with vLLM. Safe to repeat."""
    register_quantization_config(QUANT_METHOD)(MoePressVllmConfig)
    from moepress.vllm.loader import register_loader

    register_loader()
