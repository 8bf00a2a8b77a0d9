"""The finished layers of a run, kept on disk: a stopped run continues at the first unfinished one.

Each decoder layer's result has a file of its own. Beside these files is the identity of the work
(model, text, recipe). The states to continue from are large. A card may finish a layer faster than
a disk takes them: there they are written once a minute, and a stopped run repeats the layers since.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moepress.errors import FileError, InputError
from moepress.format.checkpoint import Writer, load_json, save_json
from moepress.format.unfinished import load_unfinished, save_unfinished
from moepress.format.written import save_finished
from moepress.ranks import here
from moepress.reading.documents import parse_value

STATES_EVERY = 60.0  # seconds between states that a card leaves on disk
IDENTITY_FILE = "identity.json"
IDENTITY: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


class Journal:
    """The finished layers of a walk, one file each, and the states to continue from.

    A layer is finished once its file has its final name. The states after that layer, if they are
    written, are written before that file, so the process may be killed at any moment.

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
        self._every = STATES_EVERY if device is not None and device.type == "cuda" else 0.0
        self._written = time.monotonic()  # when states were last written
        here().agreed(lambda: check_identity(folder / IDENTITY_FILE, identity))

    def done(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return self._file(layer).is_file()

    @property
    def todo(self) -> list[int]:
        """The unfinished layers, as rank 0 finds them."""
        return here().agreed(lambda: [n for n in self.layers if not self.done(n)])

    @property
    def first(self) -> int:
        """The layer to go on with: the last one up to the first unfinished one that has states."""
        unfinished = next(iter(self.todo), len(self.layers))
        if unfinished == len(self.layers):
            return unfinished
        stored = (n for n in range(unfinished, 0, -1) if self._states(n).is_file())
        return here().agreed(lambda: next(stored, 0))

    def remaining(self, restore: Callable[[Mapping[str, Tensor]], None]) -> Iterator[int]:
        """Every layer from `first` on.

        Args:
            restore: gets the states that were committed for the first of these layers, by name. For
                layer 0 it is not called.
        """
        first = self.first
        if 0 < first < len(self.layers):
            restore(load_unfinished(self._states(first)))
        try:
            yield from range(first, len(self.layers))
        finally:
            self._writer.finish()

    def commit(
        self, layer: int, result: Mapping[str, Tensor], states: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Record a layer's result, and the states after the layer if it is time.

        Args:
            states: gives them; the ranks call it together, or none of them does.
        """
        files: dict[Path, Mapping[str, Tensor]] = {self._file(layer): result}
        last = layer + 1 == len(self.layers)
        if not last and not here().agreed(self._is_time):
            self._writer.save(files)
            return
        self._written = time.monotonic()
        kept = None if last else self._states(layer + 1)
        self._writer.save(
            files if kept is None else {kept: states(), **files}, then=lambda: self._forget(kept)
        )

    def _is_time(self) -> bool:
        return time.monotonic() - self._written >= self._every

    def _forget(self, kept: Path | None) -> None:
        """Delete all states but `kept`, also those of runs that were killed."""
        for path in self.folder.glob("states-*.safetensors"):
            if path != kept:
                path.unlink(missing_ok=True)

    def result(self, layer: int) -> dict[str, Tensor]:
        """The result that `commit` recorded for a layer in `folder`."""
        return load_unfinished(self._file(layer))

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A result elsewhere than in `folder` is a file of the output, as it will stay."""
        if path.parent == self.folder:
            save_unfinished(path, tensors)
        else:
            save_finished(path, tensors, self.folder)

    def _states(self, layer: int) -> Path:
        return self.folder / f"states-{layer:04d}.safetensors"


def layer_file(folder: Path, layer: int) -> Path:
    """File of a layer's result in the folder of a journal."""
    return folder / f"layer-{layer:04d}.safetensors"


def check_identity(path: Path, identity: Mapping[str, str], output: Path | None = None) -> None:
    """Write the identity of work to `path`, or compare it with the one that is there.

    Args:
        output: what to delete to start over; None: the folder of `path`.

    Raises:
        InputError: the file has another identity.
        FileError: it is damaged.
    """
    if not path.is_file():
        save_json(path, dict(identity))
        return
    compare_identity(path, identity, output)


MEANING = {  # of parts of an identity whose names do not say it
    "full_recipe": "the budget, or another option of the plan",
    "model_fingerprint": "the bytes of the model",
    "moepress": "the version",
    "recipe": "an option of scoring",
    "text": "the calibration text",
}


def differences(first: Mapping[str, object], second: Mapping[str, object]) -> str:
    """The parts of an identity in which two differ, as a message names them; empty: none."""
    names = sorted(k for k in {*first, *second} if first.get(k) != second.get(k))
    # Another option of scoring is another full recipe, too.
    names = [name for name in names if name != "full_recipe" or "recipe" not in names]
    return ", ".join(f"{n} ({MEANING[n]})" if n in MEANING else n for n in names)


def compare_identity(path: Path, identity: Mapping[str, str], output: Path | None = None) -> None:
    """Compare the identity of work with the one in the file `path`, if there is one.

    What else the file says is not compared. Arguments and errors: as of `check_identity`.
    """
    if not path.is_file():
        return
    start_over = f"delete {output or path.parent} to start over."
    try:
        found = parse_value(IDENTITY, load_json(path), f"{path}", "")
    except FileError as error:
        raise FileError(
            f"{path} is damaged: it does not say whose unfinished work is beside it. Restore it, "
            f"or {start_over}"
        ) from error
    if differs := differences({key: found.get(key) for key in identity}, identity):
        raise InputError(
            f"{path.parent} holds unfinished work that differs in: {differs}. "
            f"Continue it with what it was started with, choose another output, or {start_over}"
        )
