"""Bytes of each part of a model, before and after compression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moepress.errors import FileError
from moepress.format.checkpoint import is_compressed
from moepress.format.codec import pre_quant_scale_of
from moepress.format.quantization import packed_specs
from moepress.original.architectures import decoder_layers, find_experts, linear_role
from moepress.original.composite import copied, language_model
from moepress.original.folder import weight_files
from moepress.original.on_disk import disk_bytes
from moepress.original.remote_code import config_of
from moepress.original.skeleton import skeleton
from moepress.original.source import Source
from moepress.reading.headers import read_header

ROUTED = "routed experts"
EMBEDDING_AND_HEAD = "embedding and head"
COPIED = "vision, audio (copied)"
REST = "routers, norms, other"
# The part that a linear belongs to, by its role (architectures.ROLES).
BY_ROLE = {
    "attention": "attention",
    "shared_expert": "shared experts",
    "dense_mlp": "dense MLPs",
    None: REST,
}
BY_ROLE_PARTS = tuple(part for part in BY_ROLE.values() if part != REST)
PARTS = (ROUTED, *BY_ROLE_PARTS, EMBEDDING_AND_HEAD, COPIED, REST)


@dataclass(frozen=True)
class PartBytes:
    """Bytes of a part's tensors, in the original model's dtype and as they are stored."""

    original: int
    stored: int


def bytes_by_part(folder: Path, trust_remote_code: bool = False) -> dict[str, PartBytes]:
    """Bytes of the tensors of a model folder, compressed or original, by `PARTS`.

    Parts without tensors are left out. The original bytes of a packed tensor are counted in the
    dtype of config.json.

    Args:
        trust_remote_code: run code in the folder, if transformers has no class for the model.

    Raises:
        InputError: transformers cannot read the config.
        FileError: a file is damaged, or does not belong to the config.
    """
    if is_compressed(folder):
        found = bytes_of_tensors(folder, unpacked_model(folder, trust_remote_code))
    else:
        found = _original(Source(folder, trust_remote_code=trust_remote_code))
    sums = dict.fromkeys(PARTS, PartBytes(0, 0))
    for part, before, after in found:
        sums[part] = PartBytes(sums[part].original + before, sums[part].stored + after)
    return {part: bytes_ for part, bytes_ in sums.items() if bytes_.stored}


def original_bytes(folder: Path, trust_remote_code: bool = False) -> int:
    """Bytes that the whole model takes in its own dtype. Arguments and errors: `bytes_by_part`."""
    return sum(part.original for part in bytes_by_part(folder, trust_remote_code).values())


def bytes_of_tensors(folder: Path, model: Any) -> Iterator[tuple[str, int, int]]:
    """(part, original bytes, stored bytes) of every tensor of a compressed folder.

    Args:
        model: its `unpacked_model`.
    """
    specs = packed_specs(folder)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    for experts in find_experts(model).values():
        rows_and_columns = zip(experts.parameters, experts.form.shapes, strict=True)
        sizes |= {name: experts.experts * rows * cols for name, (rows, cols) in rows_and_columns}
    itemsize = model.dtype.itemsize
    parts = _parts(model)
    for shard in weight_files(folder):
        for name, entry in read_header(shard).tensors.items():
            if name in specs and name not in sizes:
                raise FileError(
                    f"{shard} holds {name}, which {type(model).__name__} has not. The files and "
                    "config.json do not belong together: copy the folder again."
                )
            before = sizes[name] * itemsize if name in specs else entry.nbytes
            yield parts.get(name, REST), before, entry.nbytes


def _original(source: Source) -> Iterator[tuple[str, int, int]]:
    """(part, original bytes, stored bytes) of every tensor of an original model.

    By the names of transformers' class: on disk, tensors may have other names.
    """
    parts = _parts(source.model)
    for name in source.all_names:
        yield parts.get(name, REST), source.nbytes(name), disk_bytes(source, name)
    for experts in source.experts.values():
        stored = sum(disk_bytes(source, name) for name in experts.matrix_names)
        yield ROUTED, experts.weights * source.dtype.itemsize, stored


def unpacked_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The original model's class for a compressed folder, on the meta device.

    Args:
        trust_remote_code: run code in the folder, if transformers has no class for the model.

    Raises:
        InputError: transformers cannot read the config, or it needs code that is not trusted.
    """
    config = config_of(folder, trust_remote_code)
    del config.quantization_config
    dtype = config.dtype or config.get_text_config().dtype
    return skeleton(config, dtype)


def _parts(model: Any) -> dict[str, str]:
    """The part that each parameter of a model belongs to, by name."""
    paths = {id(module): path for path, module in model.named_modules()}
    experts = find_experts(model)
    found = dict.fromkeys(copied(model), COPIED)
    for index, layer in enumerate(decoder_layers(model)):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                part = BY_ROLE[linear_role(path, index in experts)]
                for name, _ in module.named_parameters(recurse=False):
                    found[f"{paths[id(module)]}.{name}"] = part
    for one in experts.values():
        scale = pre_quant_scale_of(one.parameters[0])
        found |= dict.fromkeys((*one.parameters, *one.biases, scale), ROUTED)
    text = language_model(model)
    for table in (text.get_input_embeddings(), text.get_output_embeddings()):
        found[f"{paths[id(table)]}.weight"] = EMBEDDING_AND_HEAD
    return found
