"""Damaged compressed folders.

`variants(path, rng)` yields (name, apply) for a good folder; `apply(copy)` damages a copy of it.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from moepress.format.checkpoint import CHECKSUMS, CONFIG, INDEX
from tests.damage.parts import (
    Apply,
    Variants,
    damaged_bytes,
    damaged_header,
    damaged_json,
    kinds,
    read_parts,
    with_header,
)

COUNT = 120  # changes of fields of config.json; others get fewer


def variants(path: Path, rng: random.Random, count: int = COUNT) -> Variants:
    """Variants of a folder that moepress or `save_pretrained` wrote."""
    tensors = sorted(path.glob("*.safetensors"))
    weights = [file for file in tensors if not file.name.startswith("moepress_")]
    for name, changes in ((CONFIG, count), (INDEX, count // 4), (CHECKSUMS, count // 6)):
        if (path / name).is_file():
            yield from inside(name, kinds(rng))
            yield from inside(name, damaged_json(path / name, rng, changes))
            yield from inside(name, damaged_bytes(path / name, rng, count // 12))
    for file in weights:
        yield from inside(file.name, kinds(rng))
        yield from inside(file.name, damaged_bytes(file, rng, count // 12))
        yield from inside(file.name, damaged_header(file, rng, count // 4))
    yield from _shards(path, weights, rng)


def inside(name: str, found: Variants) -> Variants:
    """Damage to a file, as damage to its folder."""
    for what, apply in found:
        yield f"{name}: {what}", partial(_apply_inside, name=name, apply=apply)


def _apply_inside(folder: Path, name: str, apply: Apply) -> None:
    apply(folder / name)


def _shards(path: Path, weights: list[Path], rng: random.Random) -> Variants:
    """Shards that do not fit their index, and tensors in other files than theirs."""
    first, last = weights[0], weights[-1]
    if first != last:
        yield "shards exchanged", partial(_exchange, one=first.name, other=last.name)
        yield "a shard copied over another", partial(_copy, one=first.name, other=last.name)
    yield "a single file beside", partial(_copy, one=first.name, other="model.safetensors")
    for file in weights:
        header, _ = read_parts(file)
        names = [name for name in header if name != "__metadata__"]
        for name in rng.sample(names, min(3, len(names))):
            yield f"{name} dropped", partial(_drop, file=file.name, tensor=name)
            yield (
                f"{name} also in {first.name}",
                partial(_add, name=file.name, to=first.name, tensor=name),
            )
    if (path / INDEX).is_file():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        names = sorted(index["weight_map"])
        for file in weights:
            yield f"index without {file.name}", partial(_index_without, file=file.name)
        for target in ("../x.safetensors", "nothing.safetensors", "/dev/zero", "", last.name):
            for name in rng.sample(names, min(2, len(names))):
                yield f"index: {name} in {target}", partial(_index_to, tensor=name, target=target)


def _exchange(folder: Path, one: str, other: str) -> None:
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)


def _copy(folder: Path, one: str, other: str) -> None:
    (folder / other).write_bytes((folder / one).read_bytes())


def _drop(folder: Path, file: str, tensor: str) -> None:
    """A file without one of its tensors, whole and valid by itself."""
    header, data = read_parts(folder / file)
    start, stop = header.pop(tensor)["data_offsets"]
    for entry in (one for key, one in header.items() if key != "__metadata__"):
        if entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [n - (stop - start) for n in entry["data_offsets"]]
    with_header(folder / file, json.dumps(header).encode(), data[:start] + data[stop:])


def _add(folder: Path, name: str, to: str, tensor: str) -> None:
    """A file with a tensor of another file more, or with one of its own under another name."""
    theirs, data = read_parts(folder / name)
    start, stop = theirs[tensor]["data_offsets"]
    header, mine = read_parts(folder / to)
    new = f"{tensor}.copy" if tensor in header else tensor
    header[new] = {**theirs[tensor], "data_offsets": [len(mine), len(mine) + stop - start]}
    with_header(folder / to, json.dumps(header).encode(), mine + data[start:stop])


def _index(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return found


def _index_without(folder: Path, file: str) -> None:
    index = _index(folder)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _index_to(folder: Path, tensor: str, target: str) -> None:
    index = _index(folder)
    index["weight_map"][tensor] = target
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
