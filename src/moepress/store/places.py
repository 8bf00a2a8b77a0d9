"""Where tensors lie in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from moepress.errors import CheckpointError
from moepress.format.codec import PackedSpec
from moepress.kernels.cpu.expert_store import Place


def places_of(files: Iterable[str | Path], names: Collection[str]) -> dict[str, Place]:
    """Where some tensors lie.

    Raises:
        CheckpointError: a file is damaged, or a tensor is in none.
    """
    found: dict[str, Place] = {}
    for path in map(Path, files):
        header, start = _header(path)
        for name in names & header.keys():
            first, last = header[name]["data_offsets"]
            found[name] = Place(path, start + first, last - first)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise CheckpointError(
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
    return sum(Path(path).stat().st_size - _header(Path(path))[1] for path in files)


def _header(path: Path) -> tuple[Mapping[str, dict[str, list[int]]], int]:
    """The header of a file, and the byte at which tensors begin."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"its header says {size:,} bytes, the file has fewer")
            header = json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it again.") from error
    return header, 8 + size
