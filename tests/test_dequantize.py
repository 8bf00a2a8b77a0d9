"""A dequantized folder is a plain model that computes what the packed one computes."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import moepress
from moepress.compress import compress
from moepress.errors import CheckpointError, FileError, InputError
from moepress.format.checkpoint import CHECKSUMS, INDEX, load_json, save_json
from moepress.format.codec import pre_quant_scale_of
from moepress.format.quantization import packed_specs
from tests.conftest import small_recipe
from tests.uneven import with_uneven_norms

Folder = Callable[..., Path]


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])  # the second ties its head
def test_it_computes_what_the_packed_model_computes(
    model_folder: Folder, text_file: Path, tmp_path: Path, family: str
) -> None:
    recipe = small_recipe(text_file, "default", bits=2.5)
    packed = compress(model_folder(family), tmp_path / "packed", recipe)
    plain = moepress.dequantize(packed, tmp_path / "plain")
    model, info = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(info.values()), info
    assert not any(p.dtype == torch.uint8 for p in model.parameters())
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(packed)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert (plain / "tokenizer.json").is_file()
    assert not list(plain.glob("moepress*"))
    assert "quantization_config" not in load_json(plain / "config.json")


def test_left_out_experts_are_zeros(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    recipe = small_recipe(text_file, bits=1.5, expert_bits=(0, 3))
    packed = compress(model_folder(), tmp_path / "packed", recipe)
    plain = moepress.dequantize(packed, tmp_path / "plain")
    model = MixtralForCausalLM.from_pretrained(plain)
    here = MixtralForCausalLM.from_pretrained(packed)
    left_out = 0
    for layer, other in zip(here.model.layers, model.model.layers, strict=True):
        for expert in range(4):
            none = expert in layer.mlp.experts.left_out
            left_out += none
            for matrices in (other.mlp.experts.gate_up_proj, other.mlp.experts.down_proj):
                assert bool((matrices[expert] == 0).all()) == none
    assert left_out > 0


def test_what_cannot_be_dequantized_is_refused(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not a folder made by moepress"):
        moepress.dequantize(model_folder(), tmp_path / "new")
    packed = compress(model_folder(), tmp_path / "packed", small_recipe(text_file, bits=2))
    with pytest.raises(InputError, match="not an empty folder"):
        moepress.dequantize(packed, packed)
    broken = shutil.copytree(packed, tmp_path / "broken")
    (shard,) = broken.glob("model-layer-0001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        moepress.dequantize(broken, tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_damaged_folder_is_refused_before_any_work(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    packed = compress(model_folder(), tmp_path / "packed", small_recipe(text_file, bits=2))
    shard = packed / "model-layer-0001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FileError, match="is not as it was written"):
        moepress.dequantize(packed, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def scaled(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scaled inputs of experts."""
    work = tmp_path_factory.mktemp("scaled")
    original = with_uneven_norms(model_folder(), work / "original")
    packed = compress(original, work / "packed", small_recipe(text_file, bits=2.5))
    assert any(spec.pre_quant_scale for spec in packed_specs(packed).values())
    return packed


@pytest.mark.usefixtures("reference_backend")
def test_scales_of_inputs_are_found_in_any_file(scaled: Path, tmp_path: Path) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(scaled), torch.arange(3, 60)[None]
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    places = load_json(tmp_path / "saved" / INDEX)["weight_map"]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert places[name] != places[pre_quant_scale_of(name)]
    plain = moepress.dequantize(tmp_path / "saved", tmp_path / "plain")
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(plain)(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def without(text: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if text not in name}


def cut(text: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {
        name: value[: len(value) // 2].clone() if text in name else value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("pre_quant_scale"), "gate_up_proj_pre_quant_scale is in none of the"),
        (without("input_layernorm"), "input_layernorm.weight is in none of the model's files"),
        (cut("pre_quant_scale"), r"gate_up_proj_pre_quant_scale is \[32\]"),
        (cut("down_proj"), "down_proj is "),
    ],
)
def test_tensors_that_config_json_does_not_describe_are_refused_before_any_work(
    scaled: Path,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    says: str,
) -> None:
    broken = Path(shutil.copytree(scaled, tmp_path / "broken"))
    (broken / CHECKSUMS).unlink()  # as of folders of older versions
    shard = broken / "model-layer-0001.safetensors"
    save_file(damage(load_file(shard)), shard, {"format": "pt"})
    with pytest.raises(FileError, match=says):
        moepress.dequantize(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_widths_that_were_not_written_are_refused(scaled: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(scaled, tmp_path / "broken"))
    config = load_json(broken / "config.json")
    for name, fields in config["quantization_config"]["modules"].items():
        if "experts" in name:
            fields["bits"] = fields["bits"][::-1]  # tensors keep their sizes
    save_json(broken / "config.json", config)
    with pytest.raises(FileError, match="packed in another way than they were written"):
        moepress.dequantize(broken, tmp_path / "new")


def test_a_bfloat16_model_becomes_bfloat16(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    original = model_folder("mixtral", "bfloat16")
    packed = compress(original, tmp_path / "packed", small_recipe(text_file, bits=2))
    plain = moepress.dequantize(packed, tmp_path / "plain")
    files = plain.glob("*.safetensors")
    dtypes = {value.dtype for file in files for value in load_file(file).values()}
    assert dtypes == {torch.bfloat16}


def test_a_cut_file_of_a_stopped_run_is_refused_by_name(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = compress(model_folder(), tmp_path / "packed", small_recipe(text_file, bits=2))
    right, out = moepress.dequantize(packed, tmp_path / "right"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        module = importlib.import_module("moepress.dequantize")
        patch.setattr(module, "finish_folder", lambda *_: 1 // 0)
        moepress.dequantize(packed, out)
    cut = out / "model-layer-0001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(FileError, match=f"damaged. Delete {cut} to do that work again"):
        moepress.dequantize(packed, out)
    cut.unlink()
    moepress.dequantize(packed, out)
    assert cut.read_bytes() == (right / cut.name).read_bytes()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])  # the second ties its head
def test_a_stopped_run_needs_room_for_the_rest_only(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    recipe = small_recipe(text_file, bits=2)
    packed, out = compress(model_folder(family), tmp_path / "packed", recipe), tmp_path / "out"
    module = importlib.import_module("moepress.dequantize")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "finish_folder", lambda *_: 1 // 0)
        moepress.dequantize(packed, out)
    lost = out / "model-layer-0001.safetensors"
    free = lost.stat().st_size
    lost.unlink()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(CheckpointError, match=r"No space left .* more bytes"):
        moepress.dequantize(packed, tmp_path / "other")
    assert moepress.dequantize(packed, out) == out
