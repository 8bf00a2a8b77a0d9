"""The files of a model folder: find them, read the config, and check that they are complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import QUANTIZATION_FIELDS
from moepress.original.quantized.config import PARTS, read_quantization

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files of a model that are copied along with it: tokenizer, generation config, licence.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")


def resolve(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id.

    Raises:
        InputError: there is no such folder, and the hub has no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"No model folder {name}. Give a folder with config.json, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", *COMPANIONS]))
    except Exception as error:  # the hub client raises many types; each means: not available
        raise InputError(
            f"{name} is neither a local folder nor a model that can be fetched "
            f"({type(error).__name__}). Check the name and the network, or give a local folder."
        ) from error


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder, of the model as it is once dequantized.

    Raises:
        InputError: there is none, transformers cannot read it, or the model is quantized in a way
            that moepress does not read.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a transformers model folder.")
    read_quantization(folder)  # before transformers, which knows fewer reasons
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    for part in (config, *(getattr(config, name, None) for name in PARTS)):
        for field in QUANTIZATION_FIELDS:
            if getattr(part, field, None) is not None:
                delattr(part, field)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        InputError: the folder has none.
        CheckpointError: the index is damaged, or a file is missing, truncated or damaged.
    """
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {error!r}.") from error
        paths = [folder / name for name in sorted(names)]
    elif (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    else:
        raise InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}. Expected weights as safetensors."
        )
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"{INDEX} names {path.name}, which is not in {folder}. Fetch that shard."
            )
        with opened(path):
            pass
    return paths


def companions(folder: Path) -> list[Path]:
    """The tokenizer, generation and licence files that a copy of the model needs."""
    found = {p for pattern in COMPANIONS for p in folder.glob(pattern) if p.is_file()}
    return sorted(p for p in found if p.name not in ("config.json", INDEX))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened for reading. It stays mapped as long as one of its tensors exists.

    Raises:
        CheckpointError: it is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}. It is truncated or damaged; fetch "
            "it again."
        ) from error
