"""Files on disk: written whole or not at all, checked when opened (`docs/format.md`).

A compressed folder is a transformers folder: `config.json` with a `quantization_config`, one shard
of safetensors per decoder layer and one for the rest, an index, and the tokenizer's files. It also
has the plan, the scores that the plan was made from, and the drop costs. `config.json` is written
last: a folder that has one is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from moepress.errors import FileError, InputError, NumericalError
from moepress.format.codec import LEFT_OUT, PackedSpec
from moepress.memory import free_host_memory
from moepress.pinned import pinned_bytes
from moepress.ranks import here
from moepress.reading.config import CONFIG, config_fields
from moepress.reading.headers import read_header
from moepress.reading.json import read_json
from moepress.writing.files import write_atomically
from moepress.writing.tensors import write_tensors

FORMAT_VERSION = 7  # the highest; a folder gets the lowest version that can express its tensors
SCALED_INPUTS_VERSION = 7  # the lowest that has scales for the inputs of experts
HALF_WIDTHS_VERSION = 6  # the lowest that has half widths
FORMS_VERSION = 5  # the lowest that has experts of any form, and padded ones
TRELLIS_VERSION = 4  # the lowest that says how trellis codes are read
# Writer writes more bytes on the CPU than that, perhaps mapped, at once; or than a share of the
# memory that is free.
MOST_COPIED = 1 << 30
SHARE_COPIED = 0.1
# The same for copies of a card's tensors: an eighth is kept at a time (costs/kept_states.py), which
# pinned may take twice as much.
SHARE_PINNED_COPIES = 0.25
QUANT_METHOD = "moepress"
# Of config.json, for the model or for a part of it; the second: of old compressed-tensors.
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
PLAN = "moepress_plan.json"
SCORES = "moepress_scores.safetensors"
DROP_COSTS = "moepress_drop_costs.safetensors"
CHECKSUMS = "moepress_checksums.json"  # of every tensor; not counted as a file of the model
# Added to a finished folder by other commands; not counted as files of the model.
EVALUATION = "moepress_evaluation.json"
REPORT = "moepress_report.html"
NOT_COUNTED = (CHECKSUMS, EVALUATION, REPORT)
INDEX = "model.safetensors.index.json"
WORK = ".moepress"  # the work folder inside an unfinished folder; others begin with this


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: str | None = None) -> None:
    """Write a safetensors file atomically; equal tensors give equal bytes.

    Args:
        about: text kept in the file's metadata, for `read_about`. It is one entry, because
            safetensors writes several in an order that differs from run to run
            (docs/log.md#safetensors-metadata).
    """
    whole = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    metadata = {"format": "pt"} if about is None else {"moepress": about}
    write_atomically(path, lambda to: write_tensors(to, whole, metadata))


class Writer:
    """Writes files, at once or while the caller goes on. Only rank 0 writes.

    Args:
        device: of the computation. If it is a card, `save` copies the tensors and returns, where
            memory has room for the copies; one thread writes them.
        write: writes one file.
    """

    def __init__(
        self,
        device: torch.device | None,
        write: Callable[[Path, Mapping[str, Tensor]], None] = save_tensors,
    ) -> None:
        self._write = write
        self._card = device if device is not None and device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "moepress-write")
        self._begun: Future[None] | None = None

    def save(
        self, files: Mapping[Path, Mapping[str, Tensor]], then: Callable[[], None] | None = None
    ) -> None:
        """`save_tensors` for each of some files in turn, perhaps later.

        Waits for the files of the last call, so that memory holds the copies of one call.

        Args:
            then: called after that.

        Raises:
            CheckpointError: a file of this call, or of the last one, cannot be written.
        """
        self.finish()
        if not here().first:
            return
        tensors = [tensor for each in files.values() for tensor in each.values()]
        if self._card is None or not _have_room(tensors):
            self._save(dict(files), then)
            return
        copies: dict[Path, Mapping[str, Tensor]] = {
            path: {name: _host_copy(tensor) for name, tensor in tensors.items()}
            for path, tensors in files.items()
        }
        torch.cuda.synchronize(self._card)
        self._begun = self._pool.submit(self._save, copies, then)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: a file cannot be written.
        """
        if self._begun is not None:
            begun, self._begun = self._begun, None
            begun.result()

    def _save(
        self, files: dict[Path, Mapping[str, Tensor]], then: Callable[[], None] | None
    ) -> None:
        """Write files, and let go of each one's tensors: the thread may hold its arguments a
        moment longer than `finish` waits, and the next call would pin other memory."""
        for path in list(files):
            self._write(path, files.pop(path))
        if then is not None:
            then()


def _have_room(tensors: Sequence[Tensor]) -> bool:
    """Whether memory has room for copies of tensors, of a card's pinned ones."""
    free = free_host_memory()
    on_host = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")
    pinned = sum(pinned_bytes(tensor.nbytes) for tensor in tensors if tensor.device.type != "cpu")
    return on_host <= max(MOST_COPIED, SHARE_COPIED * free) and pinned <= SHARE_PINNED_COPIES * free


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in memory from which a card can be read fast. It is there after a synchronisation."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of moepress.

    Raises:
        FileError: it is missing, truncated or damaged.
    """
    read_header(path)
    try:
        return load_file(path)  # type: ignore[no-any-return]  # safetensors is untyped
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error


def read_about(path: Path) -> str | None:
    """The `about` text that `save_tensors` stored in a file; None if there is none.

    Raises:
        FileError: the file is missing, truncated or damaged.
    """
    return read_header(path).metadata.get("moepress")


@contextmanager
def temporary_folder(folder: Path | None) -> Iterator[Path]:
    """`folder`, made if missing. None: a new folder, deleted at the end of the `with` statement."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="moepress-") as temporary:
        yield Path(temporary)


def save_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys.

    Raises:
        NumericalError: a number is NaN or infinite, which JSON has not.
        CheckpointError: the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise NumericalError(f"{path} would hold NaN or infinity: not written.") from error
    write_atomically(path, lambda to: _write_text(to, text))


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileError: it is missing, damaged, or no JSON (reading/json.py).
    """
    return read_json(path, "The file")


def shard_name(layer: int | None) -> str:
    """File name of a decoder layer's shard; None: of the tensors outside the layers."""
    return "model-rest.safetensors" if layer is None else f"model-layer-{layer:04d}.safetensors"


# What `shard_name` and `copied_name` give.
SHARDS = ("model-rest.safetensors", "model-layer-*.safetensors", "model-copied-*.safetensors")


def copied_name(number: int) -> str:
    """File name of a shard of a composite's tensors outside its language model."""
    return f"model-copied-{number:04d}.safetensors"


def format_version(packed: Collection[PackedSpec], common: bool = True) -> int:
    """The lowest format version that can express these packed tensors.

    Args:
        common: whether the experts have the form that all versions have.
    """
    if any(spec.pre_quant_scale for spec in packed):
        return SCALED_INPUTS_VERSION
    if any(spec.has_half_widths for spec in packed):
        return HALF_WIDTHS_VERSION
    if not common:
        return FORMS_VERSION
    if any(spec.family == "trellis" for spec in packed):
        return TRELLIS_VERSION
    return 3 if any(LEFT_OUT in spec.bits for spec in packed) else 1


def check_version(version: int, modules: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Raise InputError if packed tensors of that format version cannot be read.

    Trellis codes of versions 2 and 3 are of another rotation (docs/log.md#rotation-runs).

    Args:
        modules: the field of `quantization_config`.
        what: names the folder or model in the message.
    """
    if version > FORMAT_VERSION:
        raise InputError(
            f"{what} has format version {version}; this moepress reads up to {FORMAT_VERSION}. "
            "Upgrade moepress."
        )
    old = version < TRELLIS_VERSION
    if old and any(fields.get("family") == "trellis" for fields in modules.values()):
        raise InputError(
            f"{what} has trellis codes of format version {version}; this moepress reads those of "
            f"version {TRELLIS_VERSION}. Compress the original model again."
        )


def quantization_config(
    packed: Mapping[str, PackedSpec], provenance: Mapping[str, str], common: bool = True
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        packed: by parameter name.
        provenance: what the folder was made from: model, text, recipe and plan.
        common: as of `format_version`.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": format_version(packed.values(), common),
        "modules": {name: spec.to_json() for name, spec in packed.items()},
        "provenance": dict(provenance),
    }


def finish_folder(
    out: Path,
    config: Mapping[str, Any],
    companions: Mapping[str, Path],
    quantization: Mapping[str, Any] | None,
    shards: Iterable[Path],
) -> None:
    """Write the index, the companion files and, last of all, config.json.

    Args:
        config: fields of config.json of the model that this one is made from.
        companions: files of that model to copy, by their names in the folder.
        quantization: the `quantization_config` of the config; None: it gets none.
        shards: the files of tensors in `out`.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(shards):
        with safe_open(path, framework="pt") as file:
            weight_map.update(dict.fromkeys(file.keys(), path.name))
        total += tensor_bytes(path)
    save_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, path in companions.items():
        write_atomically(out / name, partial(_copy, path))
    save_json(out / CONFIG, finished_config(config, quantization))


def finished_config(
    config: Mapping[str, Any], quantization: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The fields of config.json of a finished folder. Arguments: as of `finish_folder`."""
    fields = _without_quantization(config)
    return fields if quantization is None else {**fields, "quantization_config": dict(quantization)}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a quantized original, which its dequantized weights do not have any more."""
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_FIELDS
    }


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def folder_bytes(folder: Path) -> int:
    """Bytes of a model's files, without hidden files, subfolders, checksums, evaluation, report."""
    return sum(
        p.stat().st_size
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.name not in NOT_COUNTED
    )


def is_compressed(folder: Path) -> bool:
    """Whether a folder is a complete model compressed by moepress.

    Raises:
        FileError: its config.json is damaged.
    """
    if not os.path.lexists(folder / CONFIG):
        return False
    declared = config_fields(folder).get("quantization_config")
    return isinstance(declared, dict) and declared.get("quant_method") == QUANT_METHOD


def not_a_model(folder: Path, expected: str) -> InputError:
    """The error of a folder that is not what was expected, or not yet: unfinished work.

    Args:
        expected: what the folder is not, and what was expected.
    """
    if not os.path.lexists(folder / CONFIG) and any(folder.glob(f"{WORK}*/")):
        return InputError(
            f"{folder} is unfinished: its config.json is written last. Run the command that makes "
            "it once more, to go on with it."
        )
    return InputError(f"{folder} {expected}")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
