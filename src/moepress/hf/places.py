"""Where a class of transformers has the packed parameters of a folder.

A folder names its tensors by the class that was compressed. Other classes open it too: `AutoModel`
without the head, and the causal LM of a composite. transformers renames the tensors for them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def places_in(model: Any, stored: Collection[str]) -> dict[str, str]:
    """The parameter of `model` for each packed parameter of a folder, by its name in the folder.

    A parameter that another class has no place for, such as the head, is left out. For the class
    that was compressed every name is its own place, also one that the model does not have.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    state = model.state_dict()
    if 2 * len(state.keys() & set(stored)) > len(stored):
        return {path: path for path in stored}
    mapping = names_only(get_model_conversion_mapping(model))
    renamed = {
        path: rename_source_key(path, mapping, [], model.base_model_prefix, state)[0]
        for path in stored
    }
    if not any(path in state for path in renamed.values()):  # a folder of another model
        return {path: path for path in stored}
    return {path: place for path, place in renamed.items() if place in state}


def names_only(conversions: Collection[Any]) -> list[Any]:
    """The conversions that only rename tensors."""
    from transformers.core_model_loading import WeightRenaming

    return [one for one in conversions if isinstance(one, WeightRenaming)]
