"""Where tensors lie in safetensors files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moepress.errors import FileError
from moepress.format.codec import PackedSpec
from moepress.kernels.cpu.expert_store import Place
from moepress.reading.headers import read_header


def places_of(files: Iterable[str | Path], names: Collection[str]) -> dict[str, Place]:
    """Where some tensors lie.

    Raises:
        FileError: a file is damaged, or a tensor is in none of the files.
    """
    found: dict[str, Place] = {}
    for path in map(Path, files):
        tensors = read_header(path).tensors
        for name in names & tensors.keys():
            found[name] = Place(path, tensors[name].start, tensors[name].nbytes)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise FileError(
            f"Tensor {missing[0]} is in none of the model's files. A shard is missing or damaged: "
            "copy the folder again."
        )
    return found


def matrices(place: Place, spec: PackedSpec, shape: tuple[int, int]) -> list[Place]:
    """Where each matrix of a packed tensor lies; one of 0 bits has no bytes."""
    offsets = spec.offsets(*shape)
    return [Place(place.path, place.offset + a, b - a) for a, b in pairwise(offsets)]


def total_bytes(files: Iterable[str | Path]) -> int:
    """Bytes of the tensors in some files."""
    return sum(read_header(path).tensor_bytes for path in files)


def read(places: Sequence[Place]) -> Tensor:
    """The bytes that lie in some places, one after another: [bytes] uint8, on the CPU.

    Raises:
        FileError: a file cannot be read, or ends before a place does.
    """
    found = torch.empty(sum(place.nbytes for place in places), dtype=torch.uint8, device="cpu")
    buffer, at = memoryview(found.numpy().data), 0
    for place in places:
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.offset)
                stop = at + place.nbytes
                while at < stop:
                    got = file.readinto(buffer[at:stop])
                    if not got:
                        raise OSError("it is shorter than it was")
                    at += got
        except OSError as error:
            raise FileError(
                f"{place.path} cannot be read: {error.strerror or error}. Copy it again."
            ) from error
    return found
