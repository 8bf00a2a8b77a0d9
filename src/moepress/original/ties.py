"""Which parameters of a model are one tensor. The checkpoint decides, as in transformers.

`tie_word_embeddings` in config.json says that head and embedding are one tensor. transformers
keeps both where the checkpoint holds both and they differ, and takes the one that is there where
one is missing. So does moepress. A compressed folder gets a config.json that says the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Ties:
    """How a checkpoint stores the parameters that a model's class ties to each other."""

    tied: frozenset[str]  # names of parameters that are one tensor with another, and not stored
    stored_as: Mapping[str, str]  # the name of a parameter that is stored under another's name only
    untied: bool  # the config ties parameters that the checkpoint holds as two that differ


def settle(model: Any, made: Collection[str], equal: Callable[[str, str], bool]) -> Ties:
    """Find out what is tied, and untie the skeleton where the checkpoint contradicts its config.

    Args:
        model: the skeleton, tied as its config says.
        made: names of the parameters that the checkpoint holds.
        equal: whether two of them are equal.
    """
    pairs: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    stored_as: dict[str, str] = {}
    untied = False
    for source in dict.fromkeys(pairs.values()):
        names = [source, *(target for target, one in pairs.items() if one == source)]
        there = [name for name in names if name in made]
        if there:
            stored_as |= {name: there[0] for name in names if name not in there}
        for name in there[1:]:
            if not equal(there[0], name):
                untied = True
                logger.warning(
                    "config.json says that %s and %s are one tensor, but the checkpoint holds two "
                    "that differ: both are kept, as transformers does",
                    there[0], name,
                )  # fmt: skip
    if untied:  # the flag of the config holds for all pairs
        _untie(model)
        return Ties(frozenset(), stored_as, True)
    tied = frozenset(pairs)
    return Ties(tied, {k: v for k, v in stored_as.items() if k not in tied}, False)


def _untie(model: Any) -> None:
    """Make the tied parameters of a skeleton independent; its config then says so."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_expanded_tied_weights_keys():
            setattr(module.config, FLAG, False)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, changed to say that nothing is tied."""
    changed = {
        key: untied_config(value)
        if isinstance(value, Mapping) and (FLAG in value or key.endswith("text_config"))
        else value
        for key, value in config.items()
    }
    return {**changed, FLAG: False}


def embedding_and_head(
    model: Any, paths: Mapping[int, str], stored: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Roles, "embedding" or "head", by parameter name. A tied tensor has both.

    Args:
        model: the language model.
        paths: of all modules, by their id.
        stored: names of the parameters that are stored; of tied ones only one is.
    """
    embedding, head = (
        f"{paths[id(module)]}.weight"
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if head not in stored:  # tied: one tensor, stored once
        return {embedding: ("embedding", "head")}
    return {embedding: ("embedding",), head: ("head",)}
