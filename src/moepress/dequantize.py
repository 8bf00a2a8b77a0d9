"""Turn a compressed folder back into a plain transformers model with the weights of its codes.

The result has the size of the original model. It needs no moepress: for tools that cannot read
packed weights, for checks, and as an oracle in tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import finish_folder, load_json, packed_specs, save_tensors
from moepress.format.codec import LEFT_OUT, PackedSpec
from moepress.kernels import reference
from moepress.original.architectures import Experts, find_experts
from moepress.original.folder import companions, weight_files
from moepress.original.sizes import unpacked_model
from moepress.progress import Progress

OURS = "moepress_"  # how the names of files begin that describe the compressed folder


def dequantize(folder: str | Path, out: str | Path) -> Path:
    """Write a compressed model with plain weights, for transformers without moepress.

    One file of the folder, usually a decoder layer, is in memory at a time. Experts that are left
    out become zeros. Weights have the dtype of config.json; tensors have the names of transformers'
    class.

    Args:
        folder: a folder made by moepress.
        out: folder to make. It must be new or empty.

    Returns:
        `out`.

    Raises:
        InputError: `folder` was not made by moepress, or `out` is not empty.
        CheckpointError: a file is damaged or cannot be written, or the disk is too small.
    """
    folder, out = Path(folder), Path(out)
    specs = packed_specs(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder. Give the name of a new one.")
    model = unpacked_model(folder)
    files = weight_files(folder)
    _check_space(out, model)
    plain = _Plain(model, specs)
    with Progress("dequantize", total=len(files)) as progress:
        for path in files:
            save_tensors(out / path.name, plain.tensors(path))
            progress.advance()
    finish_folder(
        out,
        load_json(folder / "config.json"),
        [path for path in companions(folder) if not path.name.startswith(OURS)],
        None,
        [out / path.name for path in files],
    )
    return out


class _Plain:
    """The tensors of a compressed folder, with the weights of packed ones.

    Args:
        model: transformers' class of the model, on the meta device.
        specs: how packed tensors are stored, by name.
    """

    def __init__(self, model: Any, specs: Mapping[str, PackedSpec]) -> None:
        self._specs = specs
        self._dtype: torch.dtype = model.dtype
        self._state: dict[str, Tensor] = model.state_dict()
        self._experts: dict[str, Experts] = {
            name: experts for experts in find_experts(model).values() for name in experts.parameters
        }

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, by the names of transformers' class."""
        found: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                found |= self._tensor(name, file.get_tensor(name))
        return found

    def _tensor(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """What a stored tensor stands for: one parameter of transformers' class, or several."""
        if name not in self._specs:
            return {name: value}
        spec = self._specs[name]
        if name in self._experts:
            return self._matrices_of_experts(self._experts[name], name, value)
        if name not in self._state:
            raise CheckpointError(
                f"config.json packs {name}, which the model has not. The file is damaged or "
                "belongs to another model: copy the folder again."
            )
        (codec,) = spec.codecs
        rows, cols = self._state[name].shape
        return {name: reference.dequantize(value, rows, cols, codec, self._dtype)}

    def _matrices_of_experts(self, experts: Experts, name: str, value: Tensor) -> dict[str, Tensor]:
        first = name == experts.parameters[0]
        rows, cols = experts.gate_up_shape if first else experts.down_shape
        spec = self._specs[name]
        whole = torch.zeros(experts.experts, rows, cols, dtype=self._dtype)
        starts = spec.offsets(rows, cols)
        kept = [expert for expert, bits in enumerate(spec.bits) if bits != LEFT_OUT]
        for expert in kept:
            part = value[starts[expert] : starts[expert + 1]]
            codec = spec.codec(expert)
            whole[expert] = reference.dequantize(part, rows, cols, codec, self._dtype)
        return {name: whole}


def _check_space(out: Path, model: Any) -> None:
    """Raise CheckpointError, before any work, if the disk cannot hold the model."""
    need = sum(value.nbytes for value in model.state_dict().values())
    where = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(where).free
    if free < need:
        raise CheckpointError(
            f"No space left for {out}: the model takes {need:,} bytes, {free:,} are free. Free "
            "some, or choose another disk."
        )
