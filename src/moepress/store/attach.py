"""A model whose experts come from a store, in place of parameters."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moepress.errors import InputError
from moepress.kernels import cpu
from moepress.kernels.cpu.expert_store import ExpertStore, Place, pages
from moepress.kernels.gate import packed_names
from moepress.kernels.modules import PackedExperts
from moepress.kernels.stores import StoredLayer
from moepress.store.forecast import expected_misses
from moepress.store.memory import Room, plan, wanted
from moepress.store.places import matrices, places_of, total_bytes
from moepress.store.uses import HALF_LIFE, frequencies, past_uses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnDisk:
    """The experts of a model that is being opened, which stay in its files."""

    files: tuple[Path, ...]
    room: Room
    paths: tuple[str, ...]  # [L] of the experts' modules
    places: tuple[tuple[tuple[Place, Place], ...], ...]  # [L][E] gate_up and down


def leave_on_disk(
    model: Any, stored: Mapping[str, str], files: Sequence[str], devices: Collection[str]
) -> OnDisk | None:
    """Leave the experts of a packed model on disk, if `memory.wanted` says so.

    Their parameters are removed, so that transformers does not load them.

    Args:
        model: packed, on the meta device.
        stored: name in the files of each packed parameter, by its path in the model.
        files: safetensors files.
        devices: types of device that the model's modules will be on.

    Returns:
        What `attach_store` needs; None: the experts are loaded like other tensors.

    Raises:
        InputError: the memory is not understood or does not do, or the model is for another device.
        CheckpointError: a file is damaged.
    """
    memory = wanted()
    layers = {p: m for p, m in model.named_modules() if isinstance(m, PackedExperts)}
    if memory == "mapped" or not layers:
        return None
    if set(devices) - {"cpu"} or cpu.missing() is not None:
        if memory == "fit":
            return None
        raise InputError(
            f"Memory {memory!r} is given for a model on {sorted(devices)}. Experts on disk need "
            f"the CPU and the compiled kernels ({cpu.missing() or 'which are here'})."
        )
    names = {p: [stored[f"{p}.{n}"] for n in packed_names(m.gate.gated)] for p, m in layers.items()}
    found = places_of(files, {name for pair in names.values() for name in pair})
    experts = sum(place.nbytes for place in found.values())
    rest = total_bytes(files) - experts
    room = plan(memory, experts, rest)
    if room is None:
        return None
    logger.info(
        "%.3g GB of memory for %.3g GB of experts; %.3g GB of other weights stay in memory",
        room.experts / 1e9, experts / 1e9, rest / 1e9,
    )  # fmt: skip
    places = []
    for path, module in layers.items():
        gate_up, down = (found[name] for name in names[path])
        shapes = module.shapes
        places.append(
            tuple(
                zip(
                    matrices(gate_up, module.gate_up, shapes[0]),
                    matrices(down, module.down, shapes[1]),
                    strict=True,
                )
            )
        )
        module.without_matrices()
    unexpected = {re.escape(name) for pair in names.values() for name in pair}
    model._keys_to_ignore_on_load_unexpected |= unexpected
    return OnDisk(tuple(map(Path, files)), room, tuple(layers), tuple(places))


def attach_store(model: nn.Module, on_disk: OnDisk) -> ExpertStore:
    """Give the modules of a loaded model their experts, from a store.

    The other weights are copied to memory of their own: pages of mapped files could be evicted.

    Raises:
        InputError: the budget does not hold the largest expert, or memory cannot be locked.
        CheckpointError: a file is truncated, or cannot be read.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    for file in on_disk.files:
        _forget_pages(file)
    frequency = frequencies(
        on_disk.files[0].parent, on_disk.paths, [len(layer) for layer in on_disk.places]
    )
    budget = on_disk.room.experts
    if on_disk.room.locked:  # whole pages of each matrix
        budget += 2 * 2 * 4096 * sum(map(len, on_disk.places))
    store = ExpertStore(on_disk.places, [*map(past_uses, frequency)], HALF_LIFE, budget)
    sizes = [np.array([float(pages(a) + pages(b)) for a, b in layer]) for layer in on_disk.places]
    store.expected_misses = expected_misses(frequency, sizes, budget)
    for number, path in enumerate(on_disk.paths):
        module = model.get_submodule(path)
        assert isinstance(module, PackedExperts)
        tables = [
            torch.tensor(list(zip(starts, spec.numbers, strict=True)))
            for starts, spec in zip(
                store.places[number].T.tolist(), (module.gate_up, module.down), strict=True
            )
        ]
        module.read_from(StoredLayer(store, number, store.region, *tables))
    if on_disk.room.locked:
        store.fill()
    else:
        store.warm([(n, int(e)) for n, e in _most_used(frequency)])
    return store


def _most_used(frequency: Sequence[Any]) -> list[tuple[int, int]]:
    """(layer, expert) of all experts, the most frequent first."""
    flat = np.concatenate(frequency)
    layers = np.repeat(np.arange(len(frequency)), [len(row) for row in frequency])
    experts = np.concatenate([np.arange(len(row)) for row in frequency])
    order = np.argsort(-flat, kind="stable")
    return [(int(layers[i]), int(experts[i])) for i in order if flat[i] > 0]


def _forget_pages(path: Path) -> None:
    """Drop a file's pages from the page cache, where the system knows how."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
