"""Checksums of the finished files of an unfinished folder, in its work folder.

A compression takes days and may be stopped and continued many times. What a disk changes meanwhile
in a file that was finished long ago must not become part of the model. So every file of tensors is
hashed from memory before it is written, and compared in the pass over all files that writes the
folder's own checksums. One core hashes about 1 GB a second, and rounding one takes minutes; no file
is read once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moepress.errors import FileError
from moepress.format.checkpoint import load_json, save_json, save_tensors
from moepress.format.checksums import Sha256
from moepress.reading.documents import parse_value

DIGESTS: TypeAdapter[dict[str, Sha256]] = TypeAdapter(dict[str, Sha256])  # by tensor


def save_finished(path: Path, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a file of the output, and before it the checksums of its tensors.

    Args:
        folder: the work folder in which they are kept.
    """
    with ThreadPoolExecutor(thread_name_prefix="moepress-hash") as pool:
        digests = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    save_json(_digests_file(path, folder), digests)
    save_tensors(path, tensors)


def compare_written(path: Path, found: Mapping[str, str], folder: Path) -> None:
    """Compare the tensors of a file with what was written.

    Args:
        found: the SHA-256 of each tensor in the file.
        folder: as of `save_finished`. One of an older moepress has no checksums: all is accepted.

    Raises:
        FileError: a tensor is another one, or the checksums are damaged.
    """
    kept = _digests_file(path, folder)
    again = f"Delete {folder} to do that work again."
    if not kept.is_file():
        return
    try:
        written = parse_value(DIGESTS, load_json(kept), f"{kept}", "")
    except FileError as error:
        raise FileError(f"{kept}, the checksums of {path.name}, is damaged. {again}") from error
    changed = sorted(n for n in {*written, *found} if written.get(n) != found.get(n))
    if changed:
        raise FileError(
            f"{path} is not as it was written: {changed[0]} has another checksum. The disk may "
            f"have changed it since. {again}"
        )


def _digests_file(path: Path, folder: Path) -> Path:
    return folder / f"sums-{path.stem}.json"


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.sha256(content).hexdigest()  # hashing lets other threads run
