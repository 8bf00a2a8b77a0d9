"""Shared by the scripts that make rivals: their options, and the folder that they write.

A rival's folder holds two files. `weights.safetensors` has every matrix of the decoder layers as in
the rival's quantized model, dequantized to float32, under transformers' names. `about.json` has the
name, the stored bytes of each matrix (scales and zeros included), and how the rival was made.
`benchmarks/quality.py --add FOLDER` evaluates it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from measuring import base_recipe, layer_weights, opened, options
from moepress.errors import CheckpointError
from moepress.format.checkpoint import load_json, load_tensors, save_json, save_tensors
from moepress.original.architectures import linear_role
from moepress.original.source import Source
from moepress.work import calibration_ids

WEIGHTS, ABOUT = "weights.safetensors", "about.json"
ATTENTION_BITS = 4  # of methods without a mix of their own; as in our recipes `paper` and `fast`


@dataclass(frozen=True)
class Stored:
    """A matrix (or the matrices of all experts) of a rival's model."""

    weight: Tensor  # float32, as transformers shapes it
    nbytes: int  # stored, side data included


def given(about: str, names: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the options: model, calibration text, output folder, and which rivals to make."""
    parser = options(about)
    parser.add_argument("--out", type=Path, required=True, help="one folder is made here for each")
    parser.add_argument("--only", nargs="+", choices=list(names), default=list(names))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def text(chosen: argparse.Namespace) -> Tensor:
    """The calibration sequences [S, L] that moepress draws, for the rivals too."""
    return calibration_ids(Source(chosen.model), base_recipe(chosen))


def role(name: str) -> str | None:
    """The role of a matrix: "expert", a role of `architectures.ROLES`, or None for a router."""
    inside = name.split(".layers.")[1].partition(".")[2].removesuffix(".weight")
    return "expert" if ".experts." in name else linear_role(inside, in_moe_layer=True)


def unquantized(weight: Tensor) -> Stored:
    """A matrix that stays as it is, in 16 bits."""
    return Stored(weight, 2 * weight.numel())


def save(
    out: Path, model: Path, matrices: Mapping[str, Stored], settings: str, *packages: str
) -> None:
    """Write a rival's folder.

    Raises:
        CheckpointError: the matrices are not those of the model.
    """
    expected = {name: w.shape for name, w in layer_weights(opened(model)).items()}
    if {name: m.weight.shape for name, m in matrices.items()} != expected:
        raise CheckpointError(
            f"{out.name} gives {sorted(matrices)}, expected the matrices of {model}."
        )
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / WEIGHTS, {name: m.weight.float() for name, m in matrices.items()})
    about = {
        "name": out.name,
        "model": model.name,
        "settings": settings,
        "versions": {package: version(package) for package in ("torch", "transformers", *packages)},
        "stored_bytes": {name: m.nbytes for name, m in matrices.items()},
    }
    save_json(out / ABOUT, about)
    weights = sum(m.weight.numel() for m in matrices.values())
    bits = 8 * sum(m.nbytes for m in matrices.values()) / weights
    print(f"{out.name}: {bits:.3f} stored bits per weight", flush=True)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `about.json` of a rival, and its weights."""
    return load_json(folder / ABOUT), load_tensors(folder / WEIGHTS)
