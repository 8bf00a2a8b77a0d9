"""What a walk has finished, on disk: a killed run goes on at the first unfinished layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import load_json, load_tensors, save_json, save_tensors
from moepress.original.walk import Walk


class Journal:
    """What a walk has finished, in a folder: one file per layer, and the states to go on from.

    A layer counts as finished when its file has its name; the states that follow it are durable
    before that. So a process may die at any moment.

    Args:
        folder: made if missing.
        identity: what the work depends on (model, recipe, text). Other work in the same folder is
            refused rather than mixed.
        file: where the result of a layer goes; None: into `folder`.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        file: Callable[[int], Path] | None = None,
    ) -> None:
        self.folder = folder
        self._file = file or (lambda layer: folder / f"layer-{layer:04d}.safetensors")
        check_identity(folder / "identity.json", identity)

    def done(self, layer: int) -> bool:
        return self._file(layer).is_file()

    def remaining(self, walk: Walk, twin: Walk | None = None) -> Iterator[int]:
        """The layers still to do, each loaded (experts left out), the states brought up to it.

        Args:
            twin: a second walk whose states are kept too.
        """
        count = len(walk.source.layers)
        first = next((i for i in range(count) if not self.done(i)), count)
        if first < count:
            self.restore(walk, first, twin)
        for layer in range(first, count):
            with walk.source.loaded(walk.source.layer_path(layer)):
                yield layer

    def commit(
        self, walk: Walk, layer: int, result: Mapping[str, Tensor], twin: Walk | None = None
    ) -> None:
        """Record a layer's result; the states of the walks are those after the layer."""
        if layer + 1 < len(walk.source.layers):
            states = {"states": walk.states} | ({"twin": twin.states} if twin else {})
            save_tensors(self._states(layer + 1), states)
        save_tensors(self._file(layer), result)
        self._states(layer).unlink(missing_ok=True)

    def restore(self, walk: Walk, layer: int, twin: Walk | None = None) -> None:
        """Give walks the states before `layer`, as committed by the layer before it."""
        if layer == 0:
            return
        path = self._states(layer)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, so the work in {self.folder} cannot go on. Delete that folder "
                "to start over."
            )
        kept = load_tensors(path)
        walk.states.copy_(kept["states"])
        if twin is not None:
            twin.states.copy_(kept["twin"])

    def result(self, layer: int) -> dict[str, Tensor]:
        return load_tensors(self._file(layer))

    def _states(self, layer: int) -> Path:
        return self.folder / f"states-{layer:04d}.safetensors"


def check_identity(path: Path, identity: Mapping[str, str]) -> None:
    """Write down what work is done beside it; refuse if other work is already there.

    Raises:
        InputError: the file names other work.
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
