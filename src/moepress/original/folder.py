"""The files of a model folder: find them, read the config, and check that they are complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import QUANTIZATION_FIELDS
from moepress.original.quantized.config import PARTS, read_quantization
from moepress.original.remote_code import code_files, config_of

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


def resolve(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id.

    Code that the model brings is fetched with it, and not run.

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
                allow_patterns=["*.safetensors", "*.py", *COMPANIONS],
                ignore_patterns=list(FOREIGN),
            )
        )
    except Exception as error:  # the hub client raises many types; each means: not available
        raise InputError(
            f"{name} is neither a local folder nor a model that can be fetched "
            f"({type(error).__name__}). Check the name and the network, or give a local folder."
        ) from error


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder, of the model as it is once dequantized.

    Args:
        trust_remote_code: run code in the folder, if transformers has no class for the model.

    Raises:
        InputError: there is none, transformers cannot read it, it needs code that is not trusted,
            or the model is quantized in a way that moepress does not read.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a transformers model folder.")
    read_quantization(folder)  # before transformers, which knows fewer reasons
    try:
        config = config_of(folder, trust_remote_code)
    except InputError:
        raise
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
            names = set(
                json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            )
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


def companions(folder: Path) -> dict[str, Path]:
    """The files of tokenizer, processors, code and the like that a copy of the model needs.

    By their names in the folder: chat templates beside the default one are in a subfolder.
    """
    found = set(code_files(folder))
    found |= {p for pattern in COMPANIONS for p in folder.glob(pattern) if p.is_file()}
    return {
        str(path.relative_to(folder)): path
        for path in sorted(found)
        if not any(fnmatch(path.name, other) for other in NOT_COPIED)
    }


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
