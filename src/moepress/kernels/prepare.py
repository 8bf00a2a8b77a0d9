"""Compile the kernels that a loaded model will launch, at the same time.

Without this they would be compiled one after another, when the model first runs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from moepress.kernels.backends import backend_for
from moepress.kernels.cuda import several
from moepress.kernels.cuda.launch import LAUNCHERS, launcher_for
from moepress.kernels.cuda.products import FEW, MANY
from moepress.kernels.cuda.search import available
from moepress.kernels.cuda.small import KERNELS
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear

PLANES = {8: 1, 16: 2}  # activation bits to bytes of a code
# Of each program one kernel, that rounding or drawing errors launches.
ROUNDING = (
    "moepress_rotation", "moepress_drawn_errors", "moepress_viterbi_search", "moepress_values",
)  # fmt: skip
_pool = ThreadPoolExecutor(1, "moepress-compile")


def prepare(model: nn.Module) -> None:
    """Compile the kernels of a model's packed modules that are on a card. The results are kept.

    With those of captured steps, if it generates.

    Raises:
        MoepressError: NVRTC refuses a source.
    """
    wanted: dict[torch.device, set[str]] = {}
    decodes = hasattr(model, "generate")  # a whole model, of which steps can be captured
    for module in model.modules():
        parameter = next(module.parameters(), None)  # None: experts on disk
        if parameter is not None:
            found = wanted.setdefault(parameter.device, set())
            found |= kernels_of(module) | (fused_kernels_of(module) if decodes else set())
    for device, kernels in wanted.items():
        if kernels and decodes:
            kernels |= {*KERNELS, "moepress_route_small"}
        if kernels and device.type in LAUNCHERS and backend_for(device).name == "cuda":
            launcher_for(device).prepare(kernels)


def prepare_rounding(device: torch.device) -> None:
    """Begin to compile the kernels with which weights are rounded, if they run on the device.

    What fails is told when a kernel is launched.
    """
    if available(device):
        _pool.submit(launcher_for(device).prepare, ROUNDING)


def kernels_of(module: nn.Module) -> set[str]:
    """The kernels that a packed module launches; empty for any other.

    Without those of `cuda/grouped.py`, which prompts below 256 tokens do not need, of attention and
    of pruning.
    """
    if isinstance(module, PackedEmbedding):
        return {"moepress_embedding"}
    if isinstance(module, PackedLinear):
        codec = module.codec
        products = _products(codec.family, {codec.group_size}, module.activation_bits)
        return {"moepress_inputs", "moepress_combine_linear"} | products
    if isinstance(module, PackedExperts):
        groups = {module.gate_up.group_size, module.down.group_size}
        biased = getattr(module, f"{module.first_name}_bias") is not None
        plain = module.gate.gated and module.gate.plain and not biased
        gate = "moepress_gated" if plain else "moepress_gated_any"
        products = _products(module.gate_up.family, groups, module.activation_bits)
        return {"moepress_inputs", gate, "moepress_combine_experts"} | products
    return set()


def fused_kernels_of(module: nn.Module) -> set[str]:
    """Those that a packed module launches in captured steps (hf/fused.py) beside them."""
    if not isinstance(module, PackedLinear) or not module.joins:
        return set()
    return {f"{several.KERNEL}_g{module.codec.group_size}_p{PLANES[module.activation_bits]}"}


def _products(family: str, groups: set[int], activation_bits: int) -> set[str]:
    planes = PLANES[activation_bits]
    return {kind[family].name(group, planes) for kind in (FEW, MANY) for group in groups}
