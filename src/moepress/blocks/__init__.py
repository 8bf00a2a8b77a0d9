"""MoE blocks whose experts have an interface of their own, adapted to transformers' common one.

The rest of moepress knows one call, `experts(hidden [N, H], top_k_index [N, k], top_k_weights
[N, k])`, and one way to tell the form of experts (form.py). Each family that differs has a file
here, which changes its blocks so that they compute the same by that call. `adapt` is used for the
skeleton of the original model, for a model that loads packed weights, and before pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from moepress.blocks import dbrx, doge, jetmoe, llama4, longcat_flash

ADAPTERS: Mapping[str, Callable[[Any], None]] = {  # by the name of transformers' class
    "DbrxFFN": dbrx.adapt,
    "DogeCDMoE": doge.adapt,
    "JetMoeMoE": jetmoe.adapt,
    "Llama4TextMoe": llama4.adapt,
    "LongcatFlashMoE": longcat_flash.adapt,
}


def adapt(model: nn.Module) -> None:
    """Adapt all blocks of a model that need it. Safe to repeat."""
    for module in list(model.modules()):
        if type(module).__module__.startswith("transformers."):
            adapter = ADAPTERS.get(type(module).__name__)
            if adapter is not None:
                adapter(module)
