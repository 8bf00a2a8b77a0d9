"""Turn a compressed folder back into a plain transformers model with the weights of its codes.

The result has the size of the original model. It needs no moepress: for tools that cannot read
packed weights, for checks, and as an oracle in tests.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moepress.blocks.layout import without_padding
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import finish_folder, save_tensors
from moepress.format.checksums import check_config, read_checksums, verify_tensors
from moepress.format.codec import LEFT_OUT, PackedSpec, pre_quant_scale_of
from moepress.format.journal import IDENTITY_FILE, check_identity
from moepress.format.quantization import packed_specs
from moepress.format.unfinished import check_finished
from moepress.hf.agreement import check_agreement, stored_tensors
from moepress.hf.packing import pack_modules, with_tied
from moepress.kernels import reference
from moepress.original.architectures import Bias, Experts, find_experts
from moepress.original.companions import companions
from moepress.original.folder import weight_files
from moepress.original.sizes import bytes_of_tensors, unpacked_model
from moepress.progress import Progress
from moepress.reading.config import config_fields
from moepress.writing.files import check_place, is_of_finder, sweep
from moepress.writing.held import check_work, discard, held

WORK = ".moepress-dequantize"  # the work folder inside the output
OURS = "moepress_"  # how the names of files begin that describe the compressed folder


def dequantize(folder: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write a compressed model with plain weights, for transformers without moepress.

    First the tensors are compared with those that config.json describes, and every byte with its
    checksum: the result has none. One file of the folder, usually a decoder layer, is in memory at
    a time. Experts that are left out become zeros. Weights have the dtype of config.json; tensors
    have the names of transformers' class.

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
        check_config(folder, checksums)
        verify_tensors(folder, checksums, files)
    plain = _Plain(model, specs)
    stored = stored_tensors(map(str, files))
    with torch.device("meta"):
        pack_modules(model, with_tied(model, specs))
    check_agreement(model, stored, {name: name for name in stored}, same_class=True)
    plain.take_scales(files)
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
        empty = out.is_dir() and all(is_of_finder(path.name) for path in out.iterdir())
        if not (empty or (out / WORK).is_dir()):
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
        scaled = [name for name, spec in specs.items() if spec.pre_quant_scale]
        self._scaled = {pre_quant_scale_of(name): name for name in scaled}
        self._scales: dict[str, Tensor] = {}
        self._biases = {name: (one, bias) for one in layers for name, bias in one.biases.items()}

    def take_scales(self, files: Iterable[Path]) -> None:
        """Read the vectors that inputs of experts are multiplied by, wherever they are."""
        for path in files:
            with safe_open(path, framework="pt") as file:
                for vector in self._scaled.keys() & set(file.keys()):
                    self._scales[self._scaled[vector]] = file.get_tensor(vector)

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, by the names of transformers' class."""
        found: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                if name not in self._scaled:
                    found |= self._tensor(name, file.get_tensor(name))
        return found

    def _tensor(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """What a stored tensor stands for: one parameter of transformers' class, or several."""
        if name in self._biases:
            return {name: self._biases_of_experts(*self._biases[name], name, value)}
        if name not in self._specs:
            return {name: value}
        spec = self._specs[name]
        if name in self._experts:
            return self._matrices_of_experts(self._experts[name], name, value)
        (codec,) = spec.codecs
        rows, cols = self._state[name].shape
        return {name: reference.dequantize(value, rows, cols, codec, self._dtype)}

    def _matrices_of_experts(self, experts: Experts, name: str, value: Tensor) -> dict[str, Tensor]:
        first = name == experts.parameters[0]
        rows, cols = experts.gate_up_shape if first else experts.down_shape
        form, spec = experts.form, self._specs[name]
        whole = torch.zeros(experts.experts, rows, cols, dtype=self._dtype)
        starts = spec.offsets(rows, cols)
        kept = [expert for expert, bits in enumerate(spec.bits) if bits != LEFT_OUT]
        for expert in kept:
            packed = value[starts[expert] : starts[expert + 1]]
            weights = reference.dequantize(packed, rows, cols, spec.codec(expert), torch.float32)
            if spec.pre_quant_scale:  # (W / s) (s x) = W x
                weights *= self._scales[name].float()
            whole[expert] = weights
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
