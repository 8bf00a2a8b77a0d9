"""Damaged documents of moepress: plans, recipes, thresholds, evaluations, scores, calibrations.

`variants(path, rng)` yields (name, apply) for a good file; `apply(copy)` damages a copy of it.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

from tests.damage.parts import (
    Variants,
    damaged_bytes,
    damaged_header,
    damaged_json,
    json_fields,
    kinds,
    read_parts,
    with_header,
)

COUNT = 120  # changes of fields


def variants(path: Path, rng: random.Random, count: int = COUNT) -> Variants:
    """Variants of a .json, .toml or .safetensors file of moepress."""
    yield from kinds(rng)
    yield from damaged_bytes(path, rng, count // 6)
    if path.suffix == ".json":
        yield from damaged_json(path, rng, count)
    if path.suffix == ".safetensors":
        yield from damaged_header(path, rng, count // 2)
        yield from _damaged_about(path, rng, count)


def _damaged_about(path: Path, rng: random.Random, count: int) -> Variants:
    """Other fields of the document in the metadata of a safetensors file."""
    header, data = read_parts(path)
    about = header.get("__metadata__", {}).get("moepress")
    if about is None:
        return
    for name, text in json_fields(json.loads(about), rng, count):
        changed = {**header, "__metadata__": {"moepress": text}}
        raw = json.dumps(changed).encode("utf-8", "surrogatepass")
        yield f"document: {name}", partial(with_header, header=raw, data=data)
