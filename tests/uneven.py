"""Models that compute the same, and whose channels are scaled unevenly."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NORM = "post_attention_layernorm.weight"
READERS = "gate.weight", "w1.weight", "w3.weight"  # of that norm, in Mixtral's files


def uneven(width: int, seed: int = 1) -> Tensor:
    """[width] scales e^z, z normal of variance 1."""
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def with_uneven_channels(folder: Path, to: Path) -> Path:
    """The same Mixtral with channels of up and `down` scaled against each other."""
    tensors = _tensors(folder)
    for name in [name for name in tensors if name.endswith(".w3.weight")]:
        scale = uneven(len(tensors[name]), seed=len(name))
        tensors[name] = tensors[name] / scale[:, None]
        down = name.replace("w3", "w2")
        tensors[down] = tensors[down] * scale
    return _written(tensors, folder, to)


def with_uneven_norms(folder: Path, to: Path) -> Path:
    """The same Mixtral with norms in front of its experts that scale channels unevenly."""
    tensors = _tensors(folder)
    for name in [name for name in tensors if name.endswith(NORM)]:
        dtype, scale = tensors[name].dtype, uneven(len(tensors[name]))
        tensors[name] = (tensors[name] * scale).to(dtype)
        block = name.replace(NORM, "block_sparse_moe.")
        for reader in [one for one in tensors if one.startswith(block) and one.endswith(READERS)]:
            tensors[reader] = (tensors[reader] / scale).to(dtype)
    return _written(tensors, folder, to)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _written(tensors: dict[str, Tensor], folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to
