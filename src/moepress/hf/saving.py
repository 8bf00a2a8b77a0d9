"""What `save_pretrained` leaves out of a copy of a compressed folder, and is added here.

transformers tells a quantizer that a model is saved, but not where to. So the method itself is
wrapped (methods.py): it also copies the files of moepress, aligns the tensors (writing/tensors.py),
and writes checksums.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepress.format.checkpoint import (
    CHECKSUMS,
    DROP_COSTS,
    INDEX,
    PLAN,
    SCORES,
)
from moepress.format.checksums import write_checksums
from moepress.kernels.stores import refuse
from moepress.original.folder import SINGLE, weight_files
from moepress.prune import active_pruning
from moepress.reading.config import config_fields
from moepress.writing.tensors import align

COPIED = (PLAN, SCORES, DROP_COSTS)


def remember_pruning(model: Any) -> None:
    """Write the pruning that is in force into the model's config, or remove what is not."""
    quantization = model.config.quantization_config
    pruning = active_pruning(model)
    if pruning is not None and pruning.drops:
        quantization.pruning = pruning.to_json()
    elif hasattr(quantization, "pruning"):
        del quantization.pruning


def save_with_ours(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` for packed models, from transformers' own."""

    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], *args: Any, **options: Any
    ) -> Any:
        adapter = getattr(self, "_hf_peft_config_loaded", False)  # then it alone is saved
        if adapter or not options.get("is_main_process", True):
            return save(self, save_directory, *args, **options)
        if not self.hf_quantizer.is_serializable():
            refuse("saved")
        folder = Path(save_directory)
        if folder.is_file():
            return save(self, save_directory, *args, **options)  # refuses it
        folder.mkdir(parents=True, exist_ok=True)
        _copy_ours(Path(str(self.name_or_path)), folder)
        before = _written(folder)
        result = save(self, save_directory, *args, **options)
        _remove_stale(folder, before)
        if options.get("variant") is None and not options.get("distributed_checkpoint"):
            files = weight_files(folder)
            for file in files:
                align(file)
            write_checksums(folder, files, config_fields(folder))
        return result

    return save_pretrained


def _copy_ours(origin: Path, folder: Path) -> None:
    """Replace the files of moepress in `folder` by those of the folder the model came from."""
    if origin.is_dir() and origin.samefile(folder):
        (folder / CHECKSUMS).unlink(missing_ok=True)
        return
    for name in (*COPIED, CHECKSUMS):
        (folder / name).unlink(missing_ok=True)  # of a model that was saved here before
    for name in COPIED:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def _written(folder: Path) -> dict[str, int]:
    """When each file that names or holds the weights was written."""
    paths = [folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def _remove_stale(folder: Path, before: dict[str, int]) -> None:
    """Remove a file or an index of the weights that were here before, if the other was written."""
    after = _written(folder)
    stale = [name for name in after if after[name] == before.get(name)]
    if len(after) == 2 and len(stale) == 1:
        (folder / stale[0]).unlink()
