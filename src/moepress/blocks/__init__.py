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

from moepress.blocks import dbrx, jetmoe, llama4, longcat_flash

ADAPTERS: Mapping[str, Callable[[Any], None]] = {  # by the name of transformers' class
    "DbrxFFN": dbrx.adapt,
    "JetMoeMoE": jetmoe.adapt,
    "Llama4TextMoe": llama4.adapt,
    "LongcatFlashMoE": longcat_flash.adapt,
}
REFUSED: Mapping[str, str] = {  # why, by the name of transformers' class
    "DogeCDMoE": "Its experts are single rows of two tables: each is one neuron, so a width of its "
    "own for each would take more bytes than it saves. Nothing to compress by experts.",
}


def refusal(model: nn.Module) -> str | None:
    """Why the MoE blocks of a model cannot be compressed; None: nothing is known against them."""
    names = {type(module).__name__ for module in model.modules()}
    return next((why for name, why in REFUSED.items() if name in names), None)


def adapt(model: nn.Module) -> None:
    """Adapt all blocks of a model that need it. Safe to repeat."""
    for module in list(model.modules()):
        if type(module).__module__.startswith("transformers."):
            adapter = ADAPTERS.get(type(module).__name__)
            if adapter is not None:
                adapter(module)
