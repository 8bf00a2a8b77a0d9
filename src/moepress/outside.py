"""The tensors outside the decoder layers of a compressed model: rounded, or copied as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moepress.format.checkpoint import copied_name, shard_name
from moepress.format.codec import PackedSpec
from moepress.format.written import save_finished
from moepress.original.source import Source
from moepress.rounding.methods import quantize_matrix

COPIED_BYTES = 2 << 30  # most bytes of a file of copied tensors


def write_outside_layers(
    source: Source, packed: Mapping[str, PackedSpec], out: Path, folder: Path
) -> None:
    """Write the files of everything that is outside the layers, those that are not there yet.

    Args:
        folder: where their checksums are kept (format/written.py).
    """
    if not (out / shard_name(None)).is_file():
        save_finished(out / shard_name(None), outside_layers(source, packed), folder)
    for path, names in copied_shards(source).items():
        if not (out / path).is_file():
            copied = {name: source.tensor(name).to("cpu") for name in names}
            save_finished(out / path, copied, folder)


@torch.inference_mode()
def outside_layers(source: Source, packed: Mapping[str, PackedSpec]) -> dict[str, Tensor]:
    """Stored tensors outside the layers. Embedding and head, if packed, are rounded to nearest."""
    tensors = {}
    source.upcoming.tensors(source.names(None), "the tensors outside the layers")
    for name in source.names(None):
        value = source.tensor(name)
        if name in packed:
            (codec,) = packed[name].codecs
            value = quantize_matrix("rtn", value, codec, None).pack()
        tensors[name] = value.to("cpu")
    return tensors


def copied_shards(source: Source) -> dict[str, list[str]]:
    """Names of a composite's copied tensors, by the file that stores them.

    A file has at most COPIED_BYTES, or one tensor: they are in memory while it is written.
    """
    shards: dict[str, list[str]] = {}
    size = COPIED_BYTES + 1  # a file is begun with the first tensor
    for name in source.copied:
        size += source.nbytes(name)
        if size > COPIED_BYTES:
            size = source.nbytes(name)
            shards[copied_name(len(shards))] = []
        shards[copied_name(len(shards) - 1)].append(name)
    return shards
