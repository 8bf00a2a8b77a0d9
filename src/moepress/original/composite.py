"""Where a composite model has its language model, and which tensors a text does not need.

transformers nests language models in several ways: `model.language_model` beside `lm_head`
(Qwen3-VL), a whole causal LM as `language_model` (Llama 4), or a composite inside a composite
(`thinker` of Qwen3-Omni). A model that reads only text is its own language model.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from moepress.errors import InputError

# Experts inside decoder layers that see only tokens of images or sound, by their module path.
# ERNIE 4.5 VL has them. They are copied, like the towers.
NOT_FOR_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio)")


def decoder(model: Any) -> Any:
    """The module that holds the decoder layers of a model, with a head or without.

    Raises:
        InputError: there is none where transformers' models have it.
    """
    for module in _submodels(model):
        found = _own_decoder(module)
        if found is not None:
            return found
    raise InputError(
        f"{type(model).__name__} has {len(lists_of_layers(model))} lists of decoder layers where "
        "transformers' other causal LMs have one (model.get_decoder().layers). This model cannot "
        "be walked."
    )


def language_model(model: Any) -> Any:
    """The part of a model that reads token ids and returns logits: the model itself, or inside it.

    Raises:
        InputError: there is none.
    """
    for module in _submodels(model):
        if module.get_output_embeddings() is not None and _own_decoder(module) is not None:
            return module
    raise InputError(
        f"{type(model).__name__} has no language model with a head. Expected a model that writes "
        "text."
    )


def other_models(model: Any) -> tuple[str, ...]:
    """Module paths of the models inside a composite that a text does not pass: towers, a talker."""
    text = decoder(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[str] = []
    for module in _submodels(model):
        holds = any(inner is text for inner in module.modules())
        path = paths[id(module)]
        if not holds and not is_inside(path, (paths[id(text)], *found)):
            found.append(path)
    return tuple(found)


def copied(model: Any) -> tuple[str, ...]:
    """Names of the parameters and buffers outside a composite's language model.

    They are stored as they are. A model that reads only text has none.
    """
    if not other_models(model):
        return ()
    text = decoder(model)
    head = language_model(model).get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is text or module is head]
    names = model.state_dict(keep_vars=True)
    return tuple(name for name in names if not is_inside(name, paths))


def is_inside(name: str, paths: Any) -> bool:
    """Whether a parameter or module is one of `paths`, or inside one of them."""
    return any(path == "" or name == path or name.startswith(path + ".") for path in paths)


def _submodels(model: Any) -> list[Any]:
    """The model and the transformers models inside it, outer ones first."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def lists_of_layers(module: Any) -> list[Any]:
    """The lists of decoder layers inside a module, by the class that layers have in common."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        part
        for part in module.modules()
        if isinstance(part, nn.ModuleList)
        and len(part)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in part)
    ]


def _own_decoder(model: Any) -> Any:
    """What `get_decoder` finds, followed until it has decoder layers; None: it never does."""
    seen: list[Any] = []
    while not any(model is one for one in seen):
        if isinstance(getattr(model, "layers", None), nn.ModuleList):
            return model
        seen.append(model)
        model = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = lists_of_layers(model)
    if len(lists) != 1:
        return None
    (layers,) = lists  # under another name, in the model or in a part of it
    inside = [part for part in model.children() if any(layers is one for one in part.modules())]
    return model if inside[0] is layers else inside[0]
