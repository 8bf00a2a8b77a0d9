"""Models that compute the same, and whose channels are scaled unevenly."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# What reads each norm of a layer, by the starts and ends of names in Mixtral's files.
READERS = {
    "input_layernorm.weight": ("self_attn.", ("q_proj.weight", "k_proj.weight", "v_proj.weight")),
    "post_attention_layernorm.weight": (
        "block_sparse_moe.",
        ("gate.weight", "w1.weight", "w3.weight"),
    ),
}

KEY_VALUE_HEADS = 2  # of the Mixtral of tests/conftest.py


def uneven(width: int, seed: int = 1) -> Tensor:
    """[width] scales e^z, z normal of variance 1."""
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def with_uneven_channels(folder: Path, to: Path) -> Path:
    """The same Mixtral, channels scaled against each other: up and `down`, values and output."""
    tensors = _tensors(folder)
    for name in [name for name in tensors if name.endswith(".v_proj.weight")]:
        output = name.replace("v_proj", "o_proj")
        dtype, scale = tensors[name].dtype, uneven(len(tensors[name]))
        tensors[name] = (tensors[name] / scale[:, None]).to(dtype)
        heads = scale.view(KEY_VALUE_HEADS, 1, -1)  # the queries' heads share values
        repeats = tensors[output].shape[1] // len(scale)
        of_columns = heads.expand(-1, repeats, -1).reshape(-1)
        tensors[output] = (tensors[output] * of_columns).to(dtype)
    for name in [name for name in tensors if name.endswith(".w3.weight")]:
        dtype, scale = tensors[name].dtype, uneven(len(tensors[name]), seed=len(name))
        tensors[name] = (tensors[name] / scale[:, None]).to(dtype)
        down = name.replace("w3", "w2")
        tensors[down] = (tensors[down] * scale).to(dtype)
    return _written(tensors, folder, to)


def with_uneven_norms(folder: Path, to: Path) -> Path:
    """The same Mixtral with norms that scale channels unevenly, before attention and experts."""
    tensors = _tensors(folder)
    for norm, (start, ends) in READERS.items():
        for name in [name for name in tensors if name.endswith(norm)]:
            dtype, scale = tensors[name].dtype, uneven(len(tensors[name]))
            tensors[name] = (tensors[name] * scale).to(dtype)
            block = name.replace(norm, start)
            for reader in [one for one in tensors if one.startswith(block) and one.endswith(ends)]:
                tensors[reader] = (tensors[reader] / scale).to(dtype)
    return _written(tensors, folder, to)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _written(tensors: dict[str, Tensor], folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to
