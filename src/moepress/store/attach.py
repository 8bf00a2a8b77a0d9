"""A model some of whose experts come from a store, in place of parameters.

On a card, those that fit are parameters there, and a layer that has both is divided
(kernels/divided.py).
"""

from __future__ import annotations

import copy
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

from moepress.byte_units import size_text
from moepress.errors import InputError
from moepress.kernels import cpu
from moepress.kernels.cpu.expert_store import ExpertStore, Place, pages
from moepress.kernels.divided import DividedExperts
from moepress.kernels.expert_shards import kept_specs
from moepress.kernels.gate import packed_names
from moepress.kernels.modules import PackedExperts
from moepress.kernels.stores import StoredLayer
from moepress.store.forecast import expected_misses
from moepress.store.hottest import Chosen, hottest, share_of
from moepress.store.memory import Room, host_room, plan, wanted
from moepress.store.places import matrices, places_of, read, total_bytes
from moepress.store.uses import HALF_LIFE, Floats, frequencies, past_uses

logger = logging.getLogger(__name__)

NOTHING = Place(Path(), 0, 0)  # where an expert lies that the store does not have


@dataclass(frozen=True)
class ExpertFiles:
    """Where the experts of a model that is being opened lie in its files."""

    files: tuple[Path, ...]
    paths: tuple[str, ...]  # [L] of the experts' modules
    names: tuple[tuple[str, str], ...]  # [L] of gate_up and down, in the files
    places: tuple[tuple[tuple[Place, Place], ...], ...]  # [L][E] gate_up and down
    rest: int  # bytes of the other weights

    @property
    def sizes(self) -> list[Floats]:
        """[L] [E] bytes."""
        return [np.array([float(a.nbytes + b.nbytes) for a, b in row]) for row in self.places]

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return int(sum(row.sum() for row in self.sizes))

    @property
    def paged(self) -> list[Floats]:
        """[L] [E] bytes of memory in a store: whole pages."""
        return [np.array([float(pages(a) + pages(b)) for a, b in row]) for row in self.places]

    def frequencies(self) -> list[Floats]:
        """[L] [E] as `uses.frequencies`."""
        return frequencies(self.files[0].parent, self.paths, [len(row) for row in self.places])


@dataclass(frozen=True)
class OnDisk:
    """The experts of a model that is being opened, which transformers does not load."""

    experts: ExpertFiles
    room: Room
    card: torch.device  # where the experts of `on_card` are read to
    on_card: Chosen  # [L] [E]; the store has the others


def expert_files(model: Any, stored: Mapping[str, str], files: Sequence[str]) -> ExpertFiles | None:
    """Where the experts of a packed model lie; None: it has none.

    Args:
        model: packed, on the meta device.
        stored: name in the files of each parameter, by its path in the model.
        files: safetensors files.

    Raises:
        CheckpointError: a file is damaged.
    """
    layers = {p: m for p, m in model.named_modules() if isinstance(m, PackedExperts)}
    if not layers:
        return None
    names = []
    for path, module in layers.items():
        first, second = (stored[f"{path}.{name}"] for name in packed_names(module.gate.gated))
        names.append((first, second))
    found = places_of(files, {name for pair in names for name in pair})
    rest = total_bytes(files) - sum(place.nbytes for place in found.values())
    places = []
    for module, (first, second) in zip(layers.values(), names, strict=True):
        gate_up, down = module.shapes
        firsts = matrices(found[first], module.gate_up, gate_up)
        places.append(tuple(zip(firsts, matrices(found[second], module.down, down), strict=True)))
    return ExpertFiles(tuple(map(Path, files)), tuple(layers), tuple(names), tuple(places), rest)


def leave_on_disk(model: Any, experts: ExpertFiles, devices: Collection[str]) -> OnDisk | None:
    """Leave the experts of a packed model on disk, if `memory.wanted` says so.

    Their parameters are removed, so that transformers does not load them.

    Args:
        model: packed, on the meta device.
        devices: types of device that the model's modules will be on.

    Returns:
        What `attach_store` needs; None: the experts are loaded like other tensors.

    Raises:
        InputError: the memory is not understood or does not do, or the model is for another device.
    """
    memory = wanted()
    if memory == "mapped":
        return None
    if set(devices) - {"cpu"} or cpu.missing() is not None:
        if memory == "fit":
            return None
        raise InputError(
            f"Memory {memory!r} is given for a model on {sorted(devices)}. Experts on disk need "
            f"the CPU and the compiled kernels ({cpu.missing() or 'which are here'})."
        )
    room = plan(memory, int(sum(row.sum() for row in experts.paged)), experts.rest)
    if room is None:
        return None
    logger.info(
        "%s of memory for %s of experts; %s of other weights stay in memory",
        size_text(room.experts), size_text(experts.nbytes), size_text(experts.rest),
    )  # fmt: skip
    nowhere = [np.zeros(len(row), dtype=np.bool_) for row in experts.places]
    _without_matrices(model, experts)
    return OnDisk(experts, room, torch.device("cpu"), nowhere)


def divide(model: Any, experts: ExpertFiles, card: torch.device, budget: int) -> OnDisk:
    """Leave those experts to a store that a card has no room for. They run on the CPU.

    Args:
        model: packed, on the meta device.
        budget: bytes of experts on the card, less than they all have.

    Raises:
        InputError: the machine's memory does not do, or its kernels are not there.
    """
    if cpu.missing() is not None:
        raise InputError(
            f"{size_text(experts.nbytes)} of experts do not fit into {size_text(budget)} of "
            f"the card, and the others need the compiled kernels of the CPU: {cpu.missing()}."
        )
    on_card = hottest(experts.frequencies(), experts.sizes, budget)
    on_host = sum(row[~here].sum() for row, here in zip(experts.paged, on_card, strict=True))
    room = host_room(wanted(), int(on_host))
    _without_matrices(model, experts)
    return OnDisk(experts, room, card, on_card)


def _without_matrices(model: Any, experts: ExpertFiles) -> None:
    for path in experts.paths:
        model.get_submodule(path).without_matrices()
    unexpected = {re.escape(name) for pair in experts.names for name in pair}
    model._keys_to_ignore_on_load_unexpected |= unexpected


def attach_store(model: nn.Module, on_disk: OnDisk) -> ExpertStore:
    """Give the modules of a loaded model their experts.

    Other weights on the CPU are copied to memory of their own: pages of mapped files could be
    evicted.

    Raises:
        InputError: the budget does not hold the largest expert, or memory cannot be locked.
        CheckpointError: a file is truncated, or cannot be read.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    experts, room = on_disk.experts, on_disk.room
    for file in experts.files:
        _forget_pages(file)
    store, frequency = _store(on_disk)
    for number, path in enumerate(experts.paths):
        module = model.get_submodule(path)
        assert isinstance(module, PackedExperts)
        _give_experts(model, path, module, on_disk, store, number)
    if room.locked:
        store.fill()
    else:
        store.warm(_most_used(frequency))
    return store


def _store(on_disk: OnDisk) -> tuple[ExpertStore, list[Floats]]:
    """The store of the experts that are not on the card, and how frequent those are, [L] [E]."""
    experts, budget = on_disk.experts, on_disk.room.experts
    every = experts.frequencies()
    places = [
        [(NOTHING, NOTHING) if on else pair for pair, on in zip(row, here, strict=True)]
        for row, here in zip(experts.places, on_disk.on_card, strict=True)
    ]
    frequency, sizes = (
        [row * ~here for row, here in zip(rows, on_disk.on_card, strict=True)]
        for rows in (every, experts.paged)
    )
    store = ExpertStore(places, [*map(past_uses, frequency)], HALF_LIFE, budget)
    of_host = 1 - share_of(every, on_disk.on_card)
    store.expected_misses = of_host * expected_misses(frequency, sizes, budget)
    return store, frequency


def _give_experts(
    model: nn.Module,
    path: str,
    module: PackedExperts,
    on_disk: OnDisk,
    store: ExpertStore,
    number: int,
) -> None:
    """Give a layer the experts on the card as parameters, and the others from the store."""
    on_card = on_disk.on_card[number]
    exists = np.array([a.nbytes > 0 for a, _ in on_disk.experts.places[number]])
    card = [int(e) for e in np.flatnonzero(on_card & exists)]
    host = [int(e) for e in np.flatnonzero(~on_card & exists)]
    if not card:
        module.to("cpu")  # biases
        _read_from(module, host, store, number)
        return
    if host:
        half: Any = copy.deepcopy(module).to("cpu")
        half.unpacked_parameters = 0  # counted once, see hf/methods.py
        _read_from(half, host, store, number)
        model.set_submodule(path, DividedExperts(module, half))
    tensors = {}
    for name, which in zip(packed_names(module.gate.gated), (0, 1), strict=True):
        some = [on_disk.experts.places[number][expert][which] for expert in card]
        tensors[name] = read(some).to(on_disk.card)
    module.become(module.intermediate_size, *kept_specs(module, card), tensors)
    module.place_tables(on_disk.card)


def _read_from(module: PackedExperts, host: list[int], store: ExpertStore, number: int) -> None:
    """Have a module take the experts `host` from layer `number` of the store, and no others."""
    module.become(module.intermediate_size, *kept_specs(module, host), {})
    tables = [
        torch.tensor(list(zip(starts, spec.numbers, strict=True)))
        for starts, spec in zip(
            store.places[number].T.tolist(), (module.gate_up, module.down), strict=True
        )
    ]
    module.read_from(StoredLayer(store, number, store.region, *tables))


def _most_used(frequency: Sequence[Floats]) -> list[tuple[int, int]]:
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
