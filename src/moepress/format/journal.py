"""The finished layers of a run, kept on disk: a stopped run continues at the first unfinished one.

Each decoder layer's result has a file of its own. Beside these files is the identity of the work
(model, text, recipe).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import Writer, load_json, load_tensors, save_json


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
        self._file = file or (lambda layer: folder / f"layer-{layer:04d}.safetensors")
        self._writer = Writer(device)
        check_identity(folder / "identity.json", identity)

    def done(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return self._file(layer).is_file()

    @property
    def todo(self) -> list[int]:
        """The unfinished layers."""
        return [layer for layer in self.layers if not self.done(layer)]

    @property
    def first(self) -> int:
        """The first unfinished layer, which is also the number of finished layers before it."""
        return next(iter(self.todo), len(self.layers))

    def remaining(self, states: Mapping[str, Tensor]) -> Iterator[int]:
        """Every layer from the first unfinished one on.

        Args:
            states: by name; overwritten with the states that were committed for the first of these
                layers. For layer 0 they stay as they are.
        """
        first = self.first
        if 0 < first < len(self.layers):
            self._restore(first, states)
        try:
            yield from range(first, len(self.layers))
        finally:
            self._writer.finish()

    def commit(
        self, layer: int, result: Mapping[str, Tensor], states: Mapping[str, Tensor]
    ) -> None:
        """Record a layer's result, and the states after the layer."""
        if layer + 1 < len(self.layers):
            self._writer.save(self._states(layer + 1), states)
        self._writer.save(self._file(layer), result)
        self._writer.run(lambda: self._states(layer).unlink(missing_ok=True))

    def result(self, layer: int) -> dict[str, Tensor]:
        """The result that `commit` recorded for a layer."""
        return load_tensors(self._file(layer))

    def _restore(self, layer: int, states: Mapping[str, Tensor]) -> None:
        path = self._states(layer)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, so the work in {self.folder} cannot go on. Delete that folder "
                "to start over."
            )
        kept = load_tensors(path)
        for name, tensor in states.items():
            tensor.copy_(kept[name])

    def _states(self, layer: int) -> Path:
        return self.folder / f"states-{layer:04d}.safetensors"


def check_identity(path: Path, identity: Mapping[str, str]) -> None:
    """Write the identity of work to `path`, or compare it with the one that is there.

    Raises:
        InputError: the file has another identity.
    """
    if not path.is_file():
        save_json(path, dict(identity))
        return
    found = load_json(path)
    differs = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
    if differs:
        raise InputError(
            f"{path.parent} holds unfinished work that differs in: {', '.join(differs)}. "
            "Continue it with what it was started with, choose another output, or delete that "
            "folder to start over."
        )
