"""Routed experts of vLLM: packed, each with its own widths, and pruned if the folder says so.

The weights of a layer's experts are one flat buffer with a table of offsets for each of the two
products; one custom op, `moepress::experts`, computes them (kernels/ops.py). vLLM's routers choose;
choices of no expert are -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels.modules import PackedExperts
from moepress.pruning.left_out import left_out_table, without_left_out
from moepress.vllm.linears import default_device

NO_EXPERT = -1


class Thresholds(nn.Module):
    """Online pruning in front of a layer's experts (docs/format.md), without protected tokens.

    A layer of experts in vLLM sees the tokens of many sequences and none of their attention, from
    which the importance of tokens is computed: no token keeps all its experts during a prefill.

    Args:
        thresholds: [k], by rank.
        renormalise: as of `Pruning`.
        left_out: experts of 0 bits.
        experts: E.
    """

    thresholds: Tensor
    left_out: Tensor

    def __init__(
        self,
        thresholds: tuple[float, ...],
        renormalise: bool,
        left_out: Sequence[int],
        experts: int,
    ) -> None:
        super().__init__()
        wanted = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
        self.register_buffer("thresholds", wanted, persistent=False)
        self.register_buffer("left_out", left_out_table(left_out, experts), persistent=False)
        self.renormalise = renormalise
        self.experts = experts

    def forward(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Choices [T, k] int64 and routing weights [T, k] that are left."""
        index = without_left_out(index, self.left_out, NO_EXPERT)
        index, weights, dropped = kernels.drop(
            index, weights, self.thresholds, self.renormalise, None, self.experts
        )
        return index.masked_fill(dropped, NO_EXPERT), weights


class ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not seen by mypy
    """How a layer's routed experts are loaded and computed."""

    def create_weights(self, layer: Any, **_: Any) -> None:
        """Nothing yet: the loader gives the layer its packed experts (`give_experts`)."""
        layer.device_of_experts = default_device()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "packed"):
            raise InputError(
                f"{layer.layer_name}: the folder has no experts for this layer. vLLM's class of "
                "this model has other layers than transformers' class."
            )

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Weighted outputs [T, H] of the chosen experts for x [T, H]."""
        index = topk_ids.long()
        if layer.pruned is not None:
            index, topk_weights = layer.pruned(index, topk_weights)
        y: Tensor = layer.packed(x, index, topk_weights)
        return y


def give_experts(layer: Any, packed: PackedExperts, pruned: Thresholds | None) -> None:
    """Give a `RoutedExperts` of vLLM its packed experts, on its device.

    Raises:
        InputError: vLLM's layer has other sizes.
    """
    found = layer.global_num_experts, layer.top_k
    if layer.global_num_experts != packed.num_experts:
        raise InputError(
            f"{layer.layer_name} has {found[0]} experts in vLLM, the folder has "
            f"{packed.num_experts}. Redundant experts (EPLB) are not supported."
        )
    if pruned is not None and len(pruned.thresholds) != found[1]:
        raise InputError(
            f"{layer.layer_name} chooses {found[1]} experts for a token, but config.json has "
            f"{len(pruned.thresholds)} thresholds. Prune the folder again."
        )
    layer.packed = packed.to(layer.device_of_experts)
    layer.pruned = None if pruned is None else pruned.to(layer.device_of_experts)
