"""The safetensors files of a compressed folder: check their headers, read them ahead of use."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from moepress.errors import CheckpointError


def check_files(files: Iterable[str], sizes: Mapping[str, int]) -> None:
    """Compare the headers of safetensors files with what the model expects; read no weights.

    Args:
        files: paths.
        sizes: bytes of each packed parameter, by its name in the files.

    Raises:
        CheckpointError: a file is damaged, or a packed tensor is missing or of another size.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sizes.keys() & set(file.keys()):
                    tensor = file.get_slice(name)
                    found[name] = tensor.get_dtype(), tensor.get_shape()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Copy it again.") from error
    for name, size in sizes.items():
        if name not in found:
            raise CheckpointError(
                f"Tensor {name} is in none of the model's files. A shard is missing or damaged: "
                "copy the folder again."
            )
        if found[name] != ("U8", [size]):
            raise CheckpointError(
                f"Tensor {name} is {found[name][1]} {found[name][0]}; config.json describes "
                f"[{size}] U8. The files and config.json do not belong together: copy the folder "
                "again."
            )


def read_ahead(files: Iterable[str]) -> threading.Thread | None:
    """Read files once, in order, in a background thread, to fill the system's page cache.

    The weights are memory-mapped: without this, the first tokens fetch them page by page, in the
    order in which experts are chosen, at a fraction of the disk's speed.

    Returns:
        The thread; None if the files would not fit in free memory, where reading the last would
        evict the first.
    """
    paths = [Path(file) for file in files]
    if sum(path.stat().st_size for path in paths) > 0.9 * psutil.virtual_memory().available:
        return None

    def run() -> None:
        buffer = bytearray(8 << 20)
        for path in paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            except OSError:  # only a speed-up: reading the weights themselves reports the error
                return

    thread = threading.Thread(target=run, name="moepress-read-ahead", daemon=True)
    thread.start()
    return thread
