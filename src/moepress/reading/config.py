"""config.json of a model folder, before transformers sees it.

transformers checks the types of the fields. It does not bound them: 2^40 layers, or labels, keep it
busy until memory ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moepress.errors import FileError
from moepress.reading.json import read_object

CONFIG = "config.json"
MODEL_TYPE = "model_type"
# Model types of published folders that are another one of transformers, and say so in their model
# cards: Kimi-K2 is DeepSeek-V3 under its own name, for engines that tell them apart.
SAME_AS = {"kimi_k2": "deepseek_v3"}
# Fields that transformers makes a list of, one entry for each: most layers, blocks, labels.
COUNTED = re.compile(r"(^|_)(layers?|depth|blocks|labels|codebooks|stages)$")
LAYERS = re.compile(r"(^|_)(layers?|depth|blocks)$")
MOST_COUNTED = 10_000
MOST = 1 << 63  # what an integer of torch can hold


def config_fields(folder: Path) -> dict[str, Any]:
    """The fields of config.json. Infinities are as transformers writes them.

    Raises:
        FileError: it cannot be read, is damaged, or asks for more than any model has.
    """
    path = folder / CONFIG
    fields = read_object(path, "The config", infinities=True)
    for name, value in _integers(fields):
        most = MOST_COUNTED if COUNTED.search(name) else MOST - 1
        if abs(value) > most:
            raise FileError(
                f"The config {path} says {name[:80]} = {str(value)[:40]}. Expected at most "
                f"{most:,}: it is damaged or was edited; fetch it again."
            )
    return fields


def known_type(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, with the model type that transformers has a class for."""
    named = fields.get(MODEL_TYPE)
    same = SAME_AS.get(named) if isinstance(named, str) else None
    return dict(fields) if same is None else {**fields, MODEL_TYPE: same}


def check_layers(folder: Path, tensors: int) -> None:
    """Refuse a config with more layers than the files have tensors, before the model is made.

    Args:
        tensors: number of tensors in the files.

    Raises:
        FileError: it has. As of `config_fields`.
    """
    least = 256  # fields of another meaning, and defaults of parts that are not made
    for name, value in _integers(config_fields(folder)):
        if LAYERS.search(name) and value > max(tensors, least):
            raise FileError(
                f"The config {folder / CONFIG} says {name[:80]} = {value:,}, but the files hold "
                f"{tensors:,} tensors. Expected at least one for each layer: fetch the model again."
            )


def _integers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The integers among the fields, those of inner objects and arrays too, and their names."""
    todo: list[tuple[str, Any]] = list(fields.items())
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.items()
        elif isinstance(value, list):
            todo += [(name, inner) for inner in value]
        elif type(value) is int:
            yield name, value
