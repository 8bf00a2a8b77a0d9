"""The states before each layer, which the backward walk needs again: in files, or in memory.

On the CPU all of them are files. A card passes a layer faster than a disk takes its states: there
they stay in the machine's memory while much more of it is free, and only once a minute they are a
file too. A stopped run computes those that are missing again, from the nearest file before them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from moepress.format.checkpoint import Writer
from moepress.format.journal import STATES_EVERY
from moepress.format.unfinished import load_unfinished, save_unfinished
from moepress.memory import free_host_memory
from moepress.pinned import pinned_empty
from moepress.ranks import here

SHARE_HELD = 0.125  # of the machine's free memory, that the states of one layer may take


def states_file(folder: Path, layer: int) -> Path:
    """File of the states before a layer, or after the last one."""
    return folder / f"states-{layer:04d}.safetensors"


class KeptStates:
    """The states before each layer, by layer; ranks that work together have files only.

    Args:
        folder: of the files.
        device: of the computation.
        layers: their number.
    """

    def __init__(self, folder: Path, device: torch.device, layers: int) -> None:
        self._folder = folder
        self._device = device
        self._layers = layers
        self._holds = device.type == "cuda" and here().count == 1
        self._writer = Writer(device, self._store)
        self._held: dict[Path, dict[str, Tensor]] = {}
        self._hold = self._write = True  # what becomes of the states that are being kept
        self._written = time.monotonic()  # when states were last written
        self._pool = ThreadPoolExecutor(1, "moepress-states")
        self._expected: dict[int, Future[Mapping[str, Tensor]]] = {}

    def on_disk(self, layer: int) -> bool:
        """Whether the states before a layer are a file."""
        return states_file(self._folder, layer).is_file()

    def keep(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what `Walk.tensors` returned before a layer. A card's are copied meanwhile.

        Raises:
            CheckpointError: a file of this call, or of the last one, cannot be written.
        """
        self._writer.finish()
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        room = self._holds and nbytes <= SHARE_HELD * free_host_memory()
        self._hold = room and layer < self._layers  # a backward walk begins before the last layer
        self._write = not room or time.monotonic() - self._written >= STATES_EVERY
        if self._write:
            self._written = time.monotonic()
        if self._hold or self._write:
            self._writer.save({states_file(self._folder, layer): tensors})

    def finish(self) -> None:
        """Wait until everything is kept.

        Raises:
            CheckpointError: a file cannot be written.
        """
        self._writer.finish()

    def expect(self, layer: int) -> None:
        """Begin to bring the states before a layer to where a card reads them fast."""
        if self._holds and layer >= 0 and layer not in self._expected:
            self._expected[layer] = self._pool.submit(self._for_card, layer)

    def tensors(self, layer: int) -> Mapping[str, Tensor]:
        """What was kept, for `Walk.restore`.

        Raises:
            FileError: its file is missing or damaged.
        """
        if layer in self._expected:
            return self._expected.pop(layer).result()
        return self._found(layer)

    def let_go(self, layer: int) -> None:
        """Free the memory of the states before a layer; their file, if there is one, stays."""
        self._held.pop(states_file(self._folder, layer), None)

    def forget(self, layer: int) -> None:
        """Delete the states before a layer."""
        self.let_go(layer)
        states_file(self._folder, layer).unlink(missing_ok=True)

    def _store(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if self._hold:  # what the writer gives lies in pinned memory, which is scarce
            self._held[path] = {k: tensor.to("cpu", copy=True) for k, tensor in tensors.items()}
        if self._write:
            save_unfinished(path, tensors)

    def _found(self, layer: int) -> Mapping[str, Tensor]:
        self.finish()
        path = states_file(self._folder, layer)
        return self._held[path] if path in self._held else load_unfinished(path)

    def _for_card(self, layer: int) -> Mapping[str, Tensor]:
        return {name: _pinned(value) for name, value in self._found(layer).items()}


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that a card reads fast; the tensor itself, where there is too little."""
    copy = pinned_empty(tuple(tensor.shape), tensor.dtype)
    return tensor if copy is None else copy.copy_(tensor)
