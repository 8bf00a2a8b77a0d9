"""The finished layers of a run, kept on disk: a stopped run continues at the first unfinished one.

Each decoder layer's result has a file of its own. Beside these files is the identity of the work
(model, text, recipe).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import Writer, load_json, save_json, save_tensors
from moepress.format.unfinished import load_unfinished, save_unfinished
from moepress.ranks import here
from moepress.reading.documents import parse_value

IDENTITY: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


class Journal:
    """The finished layers of a walk, one file each, and the states to continue from.

    A layer is finished once its file has its final name. The states after that layer are
    written before that file, so the process may be killed at any moment.

    Args:
        folder: made if missing.
        identity: what the work depends on (model, recipe, text).
        layers: number of decoder layers.
        file: returns the path of a layer's result; None: it is a file in `folder`.
        device: of the computation; files are written while a card goes on with the next layer.

    Raises:
        InputError: `folder` holds work of another identity.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        layers: int,
        file: Callable[[int], Path] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.folder = folder
        self.layers = range(layers)
        self._file = file or partial(layer_file, folder)
        self._writer = Writer(device, self._write)
        here().agreed(lambda: check_identity(folder / "identity.json", identity))

    def done(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return self._file(layer).is_file()

    @property
    def todo(self) -> list[int]:
        """The unfinished layers, as rank 0 finds them."""
        return here().agreed(lambda: [n for n in self.layers if not self.done(n)])

    @property
    def first(self) -> int:
        """The first unfinished layer, which is also the number of finished layers before it."""
        return next(iter(self.todo), len(self.layers))

    def remaining(self, restore: Callable[[Mapping[str, Tensor]], None]) -> Iterator[int]:
        """Every layer from the first unfinished one on.

        Args:
            restore: gets the states that were committed for the first of these layers, by name. For
                layer 0 it is not called.
        """
        first = self.first
        if 0 < first < len(self.layers):
            restore(self._stored_states(first))
        try:
            yield from range(first, len(self.layers))
        finally:
            self._writer.finish()

    def commit(
        self, layer: int, result: Mapping[str, Tensor], states: Mapping[str, Tensor]
    ) -> None:
        """Record a layer's result, and the states after the layer."""
        files = {self._states(layer + 1): states} if layer + 1 < len(self.layers) else {}
        self._writer.save(
            {**files, self._file(layer): result},
            then=lambda: self._states(layer).unlink(missing_ok=True),
        )

    def result(self, layer: int) -> dict[str, Tensor]:
        """The result that `commit` recorded for a layer in `folder`."""
        return load_unfinished(self._file(layer))

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A result elsewhere than in `folder` is a file of the output, as it will stay."""
        (save_unfinished if path.parent == self.folder else save_tensors)(path, tensors)

    def _stored_states(self, layer: int) -> dict[str, Tensor]:
        path = self._states(layer)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, so the work in {self.folder} cannot go on. Delete that folder "
                "to start over."
            )
        return load_unfinished(path)

    def _states(self, layer: int) -> Path:
        return self.folder / f"states-{layer:04d}.safetensors"


def layer_file(folder: Path, layer: int) -> Path:
    """File of a layer's result in the folder of a journal."""
    return folder / f"layer-{layer:04d}.safetensors"


def check_identity(path: Path, identity: Mapping[str, str]) -> None:
    """Write the identity of work to `path`, or compare it with the one that is there.

    Raises:
        InputError: the file has another identity.
    """
    if not path.is_file():
        save_json(path, dict(identity))
        return
    compare_identity(path, identity)


def compare_identity(path: Path, identity: Mapping[str, str]) -> None:
    """Compare the identity of work with the one in the file `path`, if there is one.

    Raises:
        InputError: the file has another identity.
    """
    if not path.is_file():
        return
    found = parse_value(IDENTITY, load_json(path), f"{path}", "Delete its folder to start over.")
    differs = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
    if differs:
        raise InputError(
            f"{path.parent} holds unfinished work that differs in: {', '.join(differs)}. "
            "Continue it with what it was started with, choose another output, or delete that "
            "folder to start over."
        )
