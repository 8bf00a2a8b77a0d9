"""Turn a compressed folder back into a plain transformers model with the weights of its codes.

The result has the size of the original model. It needs no moepress: for tools that cannot read
packed weights, for checks, and as an oracle in tests.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moepress.blocks.layout import without_padding
from moepress.errors import CheckpointError, FileError, InputError
from moepress.format.checkpoint import finish_folder, save_tensors
from moepress.format.checksums import read_checksums, verify_tensors
from moepress.format.codec import LEFT_OUT, PackedSpec, pre_quant_scale_of
from moepress.format.journal import IDENTITY_FILE, check_identity
from moepress.format.quantization import packed_specs
from moepress.format.unfinished import check_finished
from moepress.kernels import reference
from moepress.original.architectures import Bias, Experts, find_experts
from moepress.original.companions import companions
from moepress.original.folder import weight_files
from moepress.original.sizes import bytes_of_tensors, unpacked_model
from moepress.progress import Progress
from moepress.reading.config import config_fields
from moepress.writing.files import check_place, sweep
from moepress.writing.held import check_work, discard, held

WORK = ".moepress-dequantize"  # the work folder inside the output
OURS = "moepress_"  # how the names of files begin that describe the compressed folder


def dequantize(folder: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write a compressed model with plain weights, for transformers without moepress.

    Every byte is compared with its checksum first: the result has none. One file of the folder,
    usually a decoder layer, is in memory at a time. Experts that are left out become zeros. Weights
    have the dtype of config.json; tensors have the names of transformers' class.

    Args:
        folder: a folder made by moepress.
        out: folder to make, new or empty. A stopped run is continued by the same call.
        trust_remote_code: run code in the model's folder, where transformers has no class for it.

    Returns:
        `out`.

    Raises:
        InputError: `folder` was not made by moepress, or `out` is not empty.
        CheckpointError: a file is damaged or cannot be written, or the disk is too small.
    """
    folder, out = Path(folder), Path(out)
    specs = packed_specs(folder)
    _check_output(out)
    model = unpacked_model(folder, trust_remote_code)
    files = weight_files(folder)
    written = [out / path.name for path in files]
    _check_space(out, sum(size for _, size, _ in bytes_of_tensors(folder, model)), written)
    if (checksums := read_checksums(folder)) is not None:
        verify_tensors(folder, checksums, files)
    plain = _Plain(model, specs)
    with held(out / WORK, lambda: _kept(out, written)) as work:
        sweep(out)
        check_identity(work / IDENTITY_FILE, {"config": _digest(folder / "config.json")}, out)
        with Progress("dequantize", total=len(files)) as progress:
            for path, to in zip(files, written, strict=True):
                if to.is_file():
                    check_finished(to, delete=to)
                else:
                    save_tensors(to, plain.tensors(path))
                progress.advance()
        finish_folder(
            out,
            config_fields(folder),
            {n: path for n, path in companions(folder).items() if not n.startswith(OURS)},
            None,
            written,
        )
        discard(work)
    return out


def _check_output(out: Path) -> None:
    """Raise InputError if `out` is neither new, nor empty, nor left by a stopped `dequantize`."""
    if out.is_symlink() or out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / WORK).is_dir()):
            raise InputError(f"{out} is not an empty folder. Give the name of a new one.")
        check_work(out / WORK)
    check_place(out / WORK)


def _kept(out: Path, written: Sequence[Path]) -> str:
    done = sum(path.is_file() for path in written)
    return f"Kept in {out}: {done} of {len(written)} files." if done else ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


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
        layers = find_experts(model).values()
        self._experts = {name: experts for experts in layers for name in experts.parameters}
        self._scales = {pre_quant_scale_of(name) for name in self._experts}
        self._biases = {name: (one, bias) for one in layers for name, bias in one.biases.items()}

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, by the names of transformers' class."""
        found: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                if name not in self._scales:
                    scale = pre_quant_scale_of(name)
                    beside = file.get_tensor(scale) if scale in names else None
                    found |= self._tensor(name, file.get_tensor(name), beside)
        return found

    def _tensor(self, name: str, value: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        """What a stored tensor stands for: one parameter of transformers' class, or several.

        Args:
            scale: [K] of the inputs, if it is stored beside.
        """
        if name in self._biases:
            return {name: self._biases_of_experts(*self._biases[name], name, value)}
        if name not in self._specs:
            return {name: value}
        spec = self._specs[name]
        if name in self._experts:
            return self._matrices_of_experts(self._experts[name], name, value, scale)
        if name not in self._state:
            raise FileError(
                f"config.json packs {name}, which the model has not. The file is damaged or "
                "belongs to another model: copy the folder again."
            )
        (codec,) = spec.codecs
        rows, cols = self._state[name].shape
        return {name: reference.dequantize(value, rows, cols, codec, self._dtype)}

    def _matrices_of_experts(
        self, experts: Experts, name: str, value: Tensor, scale: Tensor | None
    ) -> dict[str, Tensor]:
        first = name == experts.parameters[0]
        rows, cols = experts.gate_up_shape if first else experts.down_shape
        form, spec = experts.form, self._specs[name]
        whole = torch.zeros(experts.experts, rows, cols, dtype=self._dtype)
        starts = spec.offsets(rows, cols)
        kept = [expert for expert, bits in enumerate(spec.bits) if bits != LEFT_OUT]
        for expert in kept:
            packed = value[starts[expert] : starts[expert + 1]]
            codec = spec.codec(expert)
            whole[expert] = reference.dequantize(packed, rows, cols, codec, self._dtype)
        if scale is not None:  # (W / s) (s x) = W x
            whole *= scale.to(whole)
        part, count = (form.gate_up, form.parts) if first else (form.down, 1)
        n, k = form.shapes[0 if first else 1]
        found = part.parameters(without_padding(whole, count, n // count, k))
        return {name: self._filled(name, value) for name, value in found.items()}

    def _filled(self, name: str, value: Tensor) -> Tensor:
        """A parameter with zeros for entries that no expert uses (longcat_flash)."""
        more = len(self._state[name]) - len(value)
        return torch.cat([value, value.new_zeros(more, *value.shape[1:])]) if more else value

    def _biases_of_experts(self, experts: Experts, bias: Bias, name: str, value: Tensor) -> Tensor:
        left_out = [bits == LEFT_OUT for bits in self._specs[experts.parameters[1]].bits]
        value = value.masked_fill(torch.tensor(left_out)[:, None], 0)
        rows = self._state[name].shape[1] // bias.parts
        return bias.part.biases(without_padding(value[..., None], bias.parts, rows, 1)[..., 0])


def _check_space(out: Path, size: int, written: Sequence[Path]) -> None:
    """Raise CheckpointError, before any work, if the disk cannot hold the rest of the model.

    Args:
        size: bytes of the model.
        written: its files; those are there that a stopped run has finished.
    """
    need = size - sum(path.stat().st_size for path in written if path.is_file())
    where = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(where).free
    if free < need:
        raise CheckpointError(
            f"No space left for {out}: the model takes {need:,} more bytes, {free:,} are free. "
            "Free some, or choose another disk."
        )
