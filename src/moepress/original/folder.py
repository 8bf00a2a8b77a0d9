"""The files of a model folder: find them, read the config, and check that they are complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moepress.errors import CheckpointError, InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files of a model that are copied along with it: tokenizer, processors of images and sound, chat
# templates, generation config, licence.
TEMPLATES = "additional_chat_templates"
COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    f"{TEMPLATES}/*.jinja",
)
# What the patterns above match, too: configs of the weights, which are written anew, and indices.
NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json")
# Weights in the format of other programs, which a snapshot leaves out.
FOREIGN = ("*/*.safetensors", "consolidated*")

# By the names of safetensors. Smaller dtypes belong to quantized models.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


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
        return Path(
            snapshot_download(
                str(name),
                allow_patterns=["*.safetensors", *COMPANIONS],
                ignore_patterns=list(FOREIGN),
            )
        )
    except Exception as error:  # the hub client raises many types; each means: not available
        raise InputError(
            f"{name} is neither a local folder nor a model that can be fetched "
            f"({type(error).__name__}). Check the name and the network, or give a local folder."
        ) from error


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder.

    Raises:
        InputError: there is none, transformers cannot read it, or the model is quantized already.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a transformers model folder.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method:
        raise InputError(
            f"{folder} is already quantized ({method}). Give the original model's folder."
        )
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


def tensor_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint, by the tensor's name."""
    found: dict[str, Path] = {}
    for path in paths:
        with opened(path) as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def dtype_on_disk(path: Path, name: str) -> torch.dtype | None:
    """The dtype of a tensor in a safetensors file; None: none of 16 bits or more."""
    with opened(path) as file:
        return DTYPES.get(file.get_slice(name).get_dtype())


def fingerprint(folder: Path, paths: Sequence[Path]) -> str:
    """A short hash of a model: of its config, and of the header and samples of every file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in paths:
        with path.open("rb") as file:
            header = file.read(8)
            digest.update(header + file.read(int.from_bytes(header, "little")))
            # Fine-tunes of one model have equal configs and headers; the samples differ.
            size = path.stat().st_size
            for place in range(16):
                file.seek(max(0, size * place // 16 - 64))
                digest.update(file.read(64))
    return digest.hexdigest()[:16]


def companions(folder: Path) -> list[Path]:
    """The files of tokenizer, processors and the like that a copy of the model needs.

    Chat templates beside the default one are in a subfolder.
    """
    found = {p for pattern in COMPANIONS for p in folder.glob(pattern) if p.is_file()}
    return sorted(p for p in found if not any(fnmatch(p.name, other) for other in NOT_COPIED))


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
