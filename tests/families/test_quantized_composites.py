"""Composites published in 4 or 8 bits: compressed as their dequantized copies are, and opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from moepress.compress import compress
from moepress.generate import generate
from moepress.inspect import inspect
from moepress.original.folder import weight_files
from tests import quantized_copies as copies
from tests.conftest import small_recipe
from tests.families.images import IMAGES, Prompt, pixels
from tests.families.models import make_model, save_model, tiny_config
from tests.families.test_composites import check_copied, check_same, joined

INT4 = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = copies.fp8_config((0, 0)) | {"weight_block_size": None, "activation_scheme": "static"}


@dataclass(frozen=True)
class Published:
    """A composite as its publisher stores it."""

    model: Callable[[], Any]
    image: Callable[[], Prompt]
    writers: dict[str, copies.Writer]
    declared: dict[str, Any]
    text_config: bool = False  # where config.json declares it
    renamed: tuple[tuple[str, str], ...] = ()  # where the hub's names are not what is saved
    codes: int = 0  # tensors at least that are quantized


def mistral_small() -> Any:
    return joined(tiny_config("mistral4"), "mistral3", model_type="pixtral", head_dim=16)


def mistral_image() -> Prompt:
    return pixels(64, 4, image_sizes=torch.tensor([[64, 64]]))


PUBLISHED = {
    # Only routed experts are quantized; config.json says so of the text part.
    "Kimi-K2.5": Published(
        lambda: make_model("kimi_k25"),
        IMAGES["kimi_k25"],
        {r"mlp\.experts\.\d+\.\w+\.weight$": copies.packed_int(4, 32)},
        copies.compressed_tensors_config("pack-quantized", [INT4]),
        text_config=True,
        renamed=(
            ("language_model.model.blocks.", "language_model.model.layers."),
            ("model.mm_projector.pre_norm", "mm_projector.pre_norm"),
        ),
        codes=2 * 4 * 3,
    ),
    # Everything is quantized but routers, norms, the indexer and the vision tower.
    "Mistral Large 4": Published(
        lambda: make_model("mistral_large4"),
        IMAGES["mistral_large4"],
        {r"^layers\.\d+\.(attention|feed_forward|shared_experts|experts\.\d+)\.w\w+\.weight$":
         copies.fp8_mistral},
        FP8,
        codes=30,
    ),
    # Experts of a layer are one tensor.
    "Mistral Small 4": Published(
        mistral_small,
        mistral_image,
        {
            r"language_model.*experts\.(gate_up|down)_proj$": copies.fp8_experts,
            r"language_model.*_proj(_with_mqa)?\.weight$": copies.fp8(
                (10**6, 10**6), ending="_scale_inv"
            ),
        },
        FP8,
        codes=20,
    ),
}  # fmt: skip
USUAL = ("Kimi-K2.5",)


def published(name: str, path: Path, tokenizer: Path) -> tuple[Path, Path]:
    """(the folder as it is published, its dequantized copy), in bfloat16."""
    one = PUBLISHED[name]
    saved = save_model(one.model().to(torch.bfloat16), path / "saved", tokenizer)
    for file in weight_files(saved):
        tensors = load_file(file)
        for stored, hub in one.renamed:
            tensors = {key.replace(stored, hub): value for key, value in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    folders = copies.quantized_copy(saved, path, one.writers, one.declared, shard=40)
    if one.text_config:
        file = folders[0] / "config.json"
        config = json.loads(file.read_text())
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        file.write_text(json.dumps(config))
    return folders


def in_float32(folder: Path, copy: Path) -> Path:
    """A copy that computes in float32, so that no rounding of weights to bfloat16 shows."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["dtype"] = "float32"
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    "name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.families) for n in PUBLISHED]
)
def test_a_quantized_composite(
    name: str, text_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    one = PUBLISHED[name]
    folders = published(name, tmp_path, tokenizer_folder)
    counts = [len({k for f in weight_files(folder) for k in load_file(f)}) for folder in folders]
    assert counts[0] - counts[1] >= one.codes, "too few tensors are quantized"
    recipe = small_recipe(text_file, bits=2.5)
    out, other = (compress(folder, tmp_path / f"out-{folder.name}", recipe) for folder in folders)
    for path in weight_files(out):
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    config, plain = (json.loads((f / "config.json").read_text()) for f in (out, folders[1]))
    assert config.pop("quantization_config")["quant_method"] == "moepress"
    assert config == plain
    assert inspect(folders[0])["quantization"]
    check_copied(folders[1], out)
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == config["architectures"][0]
    wide = in_float32(out, tmp_path / "wide")
    check_same(wide, wide, one.image(), tmp_path / "exact")
    assert generate(out, "def f1(x):", tokens=4).startswith("def f1(x):")
