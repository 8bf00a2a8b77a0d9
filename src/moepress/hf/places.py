"""Where a class of transformers has the packed parameters of a folder.

A folder names its tensors by the class that was compressed. Other classes open it too: `AutoModel`
without the head, and the causal LM of a composite. transformers renames the tensors for them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moepress.blocks import adapt


def places_in(model: Any, stored: Collection[str], same_class: bool) -> dict[str, str]:
    """The parameter of `model` for each packed parameter of a folder, by its name in the folder.

    A parameter that another class has no place for, such as the head, is left out. For the class
    that was compressed every name is its own place, also one that the model does not have.

    Args:
        model: the class's own modules, not packed yet. Blocks of experts are adapted.
        same_class: whether it is the class that was compressed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    adapt(model)
    modules = {path for path, _ in model.named_modules()}
    if 2 * sum(_module(path) in modules for path in stored) > len(stored):
        return {path: path for path in stored if same_class or _module(path) in modules}
    mapping = names_only(get_model_conversion_mapping(model))
    leaves = {path.rpartition(".")[2] for path in stored}
    state = {f"{path}.{leaf}": True for path in modules for leaf in leaves}  # what could be there
    renamed = {
        path: rename_source_key(path, mapping, [], model.base_model_prefix, state)[0]
        for path in stored
    }
    places = {path: place for path, place in renamed.items() if _module(place) in modules}
    return places or {path: path for path in stored}  # none: a folder of another model


def _module(parameter: str) -> str:
    """Path of the module that owns a parameter."""
    return parameter.rpartition(".")[0]


def names_only(conversions: Collection[Any]) -> list[Any]:
    """The conversions that only rename tensors."""
    from transformers.core_model_loading import WeightRenaming

    return [one for one in conversions if isinstance(one, WeightRenaming)]
