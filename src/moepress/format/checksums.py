"""A checksum of config.json and of every tensor of a compressed folder, in a file beside them.

Opening a folder compares the names, dtypes and shapes in that file with the headers of the tensor
files, which costs nothing. It refuses a config.json that packs tensors in another way, since all
numbers would be wrong, and warns of one that was changed elsewhere: users may change it. `verify`
compares the bytes too: one flipped bit of packed experts may turn all outputs into NaN, or change
them a little.

The hash is SHA-256: it is in the standard library, processors have instructions for it, and it
also tells apart what somebody changed on purpose.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moepress.errors import FileError, InputError
from moepress.format.checkpoint import CHECKSUMS, save_json
from moepress.reading.config import config_fields
from moepress.reading.documents import Array, Document, parse
from moepress.reading.headers import Entry, read_header
from moepress.reading.json import read_object

logger = logging.getLogger(__name__)

PIECE = 8 << 20  # bytes that are read at once
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
COPY = "The folder was damaged or changed: copy it again."


class TensorFields(Document):
    """What is known of a tensor."""

    dtype: str
    shape: Array[Annotated[int, Field(ge=0)]]
    sha256: Sha256


class Checksums(Document):
    """The file."""

    kind: Literal["checksums"]
    config: Sha256  # see `config_digest`
    packing: Sha256 | None = None  # see `packing_digest`; older folders have none
    tensors: dict[str, TensorFields]  # by name


def config_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields of config.json, as JSON with sorted keys. Pruning may be changed."""
    quantization = {**fields.get("quantization_config", {})}
    quantization.pop("pruning", None)
    return _json_digest({**fields, "quantization_config": quantization})


def packing_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of what the fields of config.json say of packed tensors: widths, groups, families."""
    return _json_digest(fields.get("quantization_config", {}).get("modules", {}))


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_checksums(
    folder: Path,
    files: Iterable[Path],
    config: Mapping[str, Any],
    check: Callable[[Path, Mapping[str, str]], None] | None = None,
) -> None:
    """Write the checksums of a folder. Reads the files once.

    Args:
        files: its safetensors files.
        config: the fields that its config.json has, or will have.
        check: called for each file with the SHA-256 of each of its tensors, before that; raises
            FileError if they are not what they should be. None: all is well.

    Raises:
        FileError: a file is damaged.
        CheckpointError: the checksums cannot be written.
    """
    files = tuple(files)
    digests = _digests(files)
    if check is not None:
        for path in files:
            check(path, {name: digests[name][1] for name in read_header(path).tensors})
    found = {
        name: TensorFields(dtype=entry.dtype, shape=entry.shape, sha256=digest)
        for name, (entry, digest) in digests.items()
    }
    made = Checksums(
        kind="checksums",
        config=config_digest(config),
        packing=packing_digest(config),
        tensors=found,
    )
    save_json(folder / CHECKSUMS, made.model_dump())


def read_checksums(folder: Path) -> Checksums | None:
    """The checksums of a folder; None: it has none, as folders of older versions.

    Raises:
        FileError: the file is damaged.
    """
    path = folder / CHECKSUMS
    if not path.exists() and not path.is_symlink():
        return None
    return parse(Checksums, read_object(path, "The checksums"), f"{path}", COPY)


def check_listed(checksums: Checksums, stored: Mapping[str, Entry]) -> None:
    """Compare names, dtypes and shapes of stored tensors with those that were written.

    Raises:
        FileError: they differ.
    """
    written = checksums.tensors
    for name in sorted(written.keys() ^ stored.keys()):
        where = "the model's files" if name in written else CHECKSUMS
        raise FileError(f"Tensor {name} is not in {where}. {COPY}")
    for name, entry in stored.items():
        one = written[name]
        if (one.dtype, one.shape) != (entry.dtype, entry.shape):
            raise FileError(
                f"Tensor {name} is {list(entry.shape)} {entry.dtype}; {CHECKSUMS} says that "
                f"{list(one.shape)} {one.dtype} was written. {COPY}"
            )


def check_config(folder: Path, checksums: Checksums) -> None:
    """Compare config.json with what was written. Warns where it was changed, and that may be meant.

    Raises:
        FileError: it packs tensors in another way than they were written: a width that stands at
            another expert moves all bytes after it, and the lengths of tensors may not show it.
    """
    fields = config_fields(folder)
    if checksums.packing not in (None, packing_digest(fields)):
        raise FileError(
            f"config.json of {folder} says that tensors are packed in another way than they were "
            "written (modules of its quantization_config): their weights would be read wrongly. "
            f"{COPY}"
        )
    if config_digest(fields) != checksums.config:
        logger.warning(
            "config.json of %s is not as it was written: it was changed or damaged", folder
        )


def verify(folder: Path, files: Iterable[Path]) -> int:
    """Compare config.json and every byte of the tensors with the checksums. Reads the files once.

    Args:
        files: the safetensors files of the folder.

    Returns:
        The number of tensors.

    Raises:
        InputError: the folder has no checksums.
        FileError: config.json was changed, a tensor is missing, added or changed, or a file is
            damaged.
    """
    checksums = read_checksums(folder)
    if checksums is None:
        raise InputError(
            f"{folder} has no {CHECKSUMS}: it was made by an older version, so its bytes cannot be "
            "verified. Compress the model again, or save it again with save_pretrained."
        )
    if config_digest(config_fields(folder)) != checksums.config:
        raise FileError(f"config.json of {folder} is not as it was written. {COPY}")
    return verify_tensors(folder, checksums, files)


def verify_tensors(folder: Path, checksums: Checksums, files: Iterable[Path]) -> int:
    """`verify`, of the tensors alone: config.json may have been edited."""
    found = _digests(files)
    check_listed(checksums, {name: entry for name, (entry, _) in found.items()})
    changed = [n for n, (_, digest) in found.items() if digest != checksums.tensors[n].sha256]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise FileError(
            f"Tensor {changed[0]}{more} of {folder} is not as it was written: its bytes have "
            f"another checksum. {COPY}"
        )
    return len(found)


def _digests(files: Iterable[Path]) -> dict[str, tuple[Entry, str]]:
    """Every tensor of some files, and the SHA-256 of its bytes, by name."""
    tensors = [(path, read_header(path).tensors) for path in files]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run, and one file has few
        begun = {
            name: (entry, pool.submit(_digest, path, entry))
            for path, of_file in tensors
            for name, entry in of_file.items()
        }
        try:
            return {name: (entry, digest.result()) for name, (entry, digest) in begun.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all are hashed first
            raise


def _digest(path: Path, entry: Entry) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left and (piece := file.read(min(left, PIECE))):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}. {COPY}") from error
    return digest.hexdigest()
