"""Faults of transformers' own classes that every user of a model would meet, mended in the model.

Llama 4's composite (5.24.0) reads `image_outputs` from the output of its language model, whose
class has no such field: every forward call ends in an AttributeError. Here it finds None there.
"""

from __future__ import annotations

from typing import Any


def mend(model: Any) -> None:
    """Mend a model in place, where its class has a known fault. Safe to repeat."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        hooks = model.language_model._forward_hooks
        if _add_image_outputs not in hooks.values():
            model.language_model.register_forward_hook(_add_image_outputs)


def _add_image_outputs(module: Any, args: Any, output: Any) -> None:
    from transformers.utils import ModelOutput

    if isinstance(output, ModelOutput) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
