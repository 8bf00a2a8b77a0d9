"""The files of a model folder: find them, read the config, and check that they are complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from moepress.errors import FileError, InputError
from moepress.format.checkpoint import QUANTIZATION_FIELDS, not_a_model
from moepress.original.arriving import growing, missing_files, what_to_do
from moepress.original.companions import FETCHED
from moepress.original.quantized.config import PARTS, read_quantization
from moepress.original.remote_code import config_of
from moepress.progress import told_if_slow
from moepress.reading.config import CONFIG, config_fields
from moepress.reading.files import regular_file
from moepress.reading.headers import read_header
from moepress.reading.json import kind_of, read_object

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
INDEX = SINGLE + ".index.json"
CHOSEN = "transformers_weights"  # field of config.json that names another file or index
# Weights in the format of other programs, which a snapshot leaves out.
FOREIGN = ("*/*.safetensors", "consolidated*")


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files that hold a model."""

    paths: tuple[Path, ...]
    assigned: Mapping[str, str]  # file name by tensor, as the index says; empty: there is no index


def resolve(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id.

    Code that the model brings is fetched with it, and not run.

    Raises:
        InputError: there is no such folder, and the hub has no such model; or it may not be read,
            has no config.json, or is unfinished.
    """
    folder = Path(name)
    try:
        if folder.is_dir() and str(name):  # "" is no name of this folder
            if not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(
                    f"The model folder {name} may not be read: change its permissions."
                )
            if not os.path.lexists(folder / CONFIG):
                raise not_a_model(folder, "has no config.json. Expected a model folder.")
            return folder
        exists = folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError(f"No model folder {name}: {error.strerror}. Check the path.") from error
    if not str(name):
        raise InputError("The name of the model is empty. Give a folder, or a hub id.")
    if exists or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"No model folder {name}. Give a folder with config.json, or a hub id.")
    from huggingface_hub import snapshot_download

    wait = f"for the hub's files of {name}, which this or another process downloads"
    try:
        with told_if_slow("waiting", wait):
            return Path(
                snapshot_download(
                    str(name),
                    allow_patterns=["*.safetensors", *FETCHED],
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
        InputError: transformers cannot read it, it needs code that is not trusted, or the model is
            quantized in a way that moepress does not read.
    """
    read_quantization(folder)  # before transformers, which knows fewer reasons
    config = config_of(folder, trust_remote_code)
    for part in (config, *(getattr(config, name, None) for name in PARTS)):
        for field in QUANTIZATION_FIELDS:
            if getattr(part, field, None) is not None:
                delattr(part, field)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Errors: as of `find_weights`."""
    return list(find_weights(folder).paths)


def find_weights(folder: Path) -> WeightFiles:
    """The safetensors files of a model folder: those that transformers takes, or a refusal.

    Raises:
        InputError: the folder has none.
        FileError: both a single file and an index of others are there, the index is damaged,
            or a file is missing, truncated, damaged or a link that leads nowhere.
    """
    chosen = config_fields(folder).get(CHOSEN) if (folder / CONFIG).exists() else None
    if chosen is not None:
        raise FileError(
            f"{folder / CONFIG} names its weights in {CHOSEN}. Expected {SINGLE} or {INDEX}: "
            "rename the files, and delete that field."
        )
    single, index = (folder / name for name in (SINGLE, INDEX))
    if not index.exists():
        if not single.exists():
            for link in (path for path in (single, index) if path.is_symlink()):
                regular_file(link, "The file of weights")  # leads nowhere
            raise InputError(
                f"{folder} has neither {SINGLE} nor {INDEX}. Expected weights as safetensors. "
                + (what_to_do(folder) or _other_weights(folder))
            )
        return WeightFiles((_checked(single),), {})
    assigned = _with_one_name(folder, _read_index(index))
    names = sorted(set(assigned.values()))
    if single.exists() and names != [SINGLE]:
        raise FileError(
            f"{folder} has {SINGLE} beside {INDEX}, which names {len(names)} other files. Expected "
            "one of both: transformers would take the single file; delete what is not the model."
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileError(missing_files(folder, missing, INDEX))
    return WeightFiles(tuple(_checked(folder / name) for name in names), assigned)


def _other_weights(folder: Path) -> str:
    """What to do with weights in PyTorch's own files, if the folder has them."""
    if not any(folder.glob("pytorch_model*.bin")):
        return "Give the folder that has them."
    return (
        "It has pytorch_model*.bin, which may run code when they are opened. If you trust them, "
        "open the folder with transformers and write it again with save_pretrained."
    )


def _read_index(path: Path) -> dict[str, str]:
    """The file name of each tensor, as an index says."""
    assigned = read_object(path, "The index").get("weight_map")
    if not isinstance(assigned, dict) or not assigned:
        found = "no weight_map" if assigned is None else f"weight_map = {kind_of(assigned)}"
        raise FileError(
            f"The index {path} has {found}. Expected the file of each tensor: fetch it again."
        )
    for tensor, name in assigned.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise FileError(
                f"The index {path} says that {tensor[:200]} is in {str(name)[:200]!r}. Expected "
                f"the name of a {SUFFIX} file in the folder: fetch it again."
            )
    return assigned


def _with_one_name(folder: Path, assigned: Mapping[str, str]) -> dict[str, str]:
    """The file name of each tensor, one name for a file and the links to it."""
    one: dict[tuple[int, int], str] = {}
    known = {}
    for name in (SINGLE, *sorted(set(assigned.values()))):
        with suppress(OSError):  # missing files are told later
            found = (folder / name).stat()
            known[name] = one.setdefault((found.st_dev, found.st_ino), name)
    return {tensor: known.get(name, name) for tensor, name in assigned.items()}


def _is_inside(name: str) -> bool:
    """Whether a name is that of a safetensors file in the folder or below it."""
    path = PurePosixPath(name)
    return name.endswith(SUFFIX) and not path.is_absolute() and ".." not in path.parts


def _checked(path: Path) -> Path:
    """A safetensors file that is whole."""
    try:
        return read_header(path).path
    except FileError as error:
        raise FileError(f"{error}{growing(path)}") from error


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


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened for reading. It stays mapped as long as one of its tensors exists.

    Raises:
        FileError: it is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} cannot be read as safetensors: {error}. It is truncated or damaged; fetch "
            "it again."
        ) from error
