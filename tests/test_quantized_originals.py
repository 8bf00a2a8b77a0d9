"""Quantized originals through the whole program: the same bytes as their dequantized copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moepress
from moepress.compress import compress
from moepress.estimate import estimate
from moepress.evaluate import evaluate
from moepress.original.on_disk import expert_codes
from moepress.original.quantized.numbers import packed_int
from moepress.original.source import Source
from moepress.original.whole import whole_model
from moepress.workload.shapes import ModelShape
from tests.conftest import small_recipe
from tests.original.test_quantized import copy_of
from tests.quantized_copies import declare, fp8_config

Folder = Callable[..., Path]


@pytest.mark.parametrize(
    ("kind", "recipe", "shard"),
    [
        ("fp8", "default", None),
        ("fp8 of MiniMax", "fast", 9),
        ("mxfp4", "default", 5),
        ("ue8m0 and fp4", "fast", None),
        ("int4 experts, fp8 attention", "fast", 11),
    ],
)
def test_the_compressed_bytes_are_those_of_the_dequantized_copy(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    kind: str,
    recipe: str,
    shard: int | None,
) -> None:
    folders = copy_of(kind, model_folder, tmp_path, shard=shard)
    wanted = small_recipe(text_file, recipe, bits=2.5)
    outs = [compress(folder, tmp_path / f"out-{folder.name}", wanted) for folder in folders]
    first, second = ({p.name: p for p in out.glob("model*.safetensors")} for out in outs)
    assert first.keys() == second.keys()
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name
    configs = [json.loads((out / "config.json").read_text()) for out in outs]
    quantization = [config.pop("quantization_config") for config in configs]
    assert configs[0] == configs[1]
    assert quantization[0]["quant_method"] == "moepress"
    assert quantization[0].keys() == quantization[1].keys()
    assert quantization[0]["modules"] == quantization[1]["modules"]
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(out)(ids).logits for out in outs]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
def test_the_compressed_folder_names_its_dtype(
    model_folder: Folder, text_file: Path, tmp_path: Path, dtype: str | None
) -> None:
    quantized, _ = copy_of("fp8", model_folder, tmp_path)
    declare(quantized, fp8_config((16, 16)), dtype=dtype)
    out = compress(quantized, tmp_path / "out", small_recipe(text_file, bits=3.0))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_an_estimate_reads_the_bytes_on_disk(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    quantized, plain = copy_of("fp8", model_folder, tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(quantized / "model.safetensors").values())
    shape, of_plain = ModelShape.of(Source(quantized)), ModelShape.of(Source(plain))
    assert shape.disk_bytes == pytest.approx(stored)
    assert shape.expert_disk == 1 + 4 / 256
    assert of_plain.expert_disk == of_plain.other_disk == 2
    recipe = small_recipe(text_file, bits=2.5)
    found = [estimate(folder, tmp_path / "out", recipe) for folder in (quantized, plain)]
    assert found[0].folder_bytes == pytest.approx(found[1].folder_bytes, abs=500)  # config.json
    for one, other in zip(found[0].stages, found[1].stages, strict=True):
        assert one.work["load"] == other.work["load"]
        assert one.work["read"] < other.work["read"]


def test_an_estimate_times_the_codes_of_the_experts(model_folder: Folder, tmp_path: Path) -> None:
    quantized, plain = copy_of("int4", model_folder, tmp_path)
    assert expert_codes(Source(quantized)) == packed_int(4)
    assert expert_codes(Source(plain)) is None


def test_a_quantized_original_is_evaluated_and_writes_text(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    quantized, plain = copy_of("fp8, ragged blocks", model_folder, tmp_path)
    measured = evaluate(
        quantized, [str(text_file)], against=plain, length=32, limit=2, generations=2
    )
    assert measured.kl == pytest.approx(0, abs=1e-6)
    assert measured.repetition == measured.original_repetition is not None
    source = Source(quantized)
    model = whole_model(source)
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=source.compute_dtype)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_text_that_the_model_writes_itself(model_folder: Folder, tmp_path: Path) -> None:
    quantized, _ = copy_of("int4 with zeros", model_folder, tmp_path)
    recipe = moepress.Recipe.load(
        "fast", calib=(("self", 1.0),), sequences=2, sequence_length=16, group_size=32, bits=3.0
    )
    out = compress(quantized, tmp_path / "out", recipe)
    assert (out / "config.json").is_file()
