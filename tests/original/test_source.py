"""The source gives what transformers gives, one piece at a time, and refuses what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moepress.compress import compress
from moepress.errors import CheckpointError, InputError, NumericalError
from moepress.original.dtypes import compute_dtype
from moepress.original.source import Source
from tests.conftest import FAMILIES, small_recipe
from tests.families.models import make_model, open_model, save_model

Folder = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_what_transformers_loads(model_folder: Folder, family: str) -> None:
    folder = model_folder(family)
    source = Source(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    seen = set()
    for prefix in (None, *source.layer_paths):
        for name in source.names(prefix):
            assert torch.equal(source.tensor(name), state[name]), name
            seen.add(name)
    for experts in source.experts.values():
        for index in range(experts.experts):
            weights = source.expert(experts.layer, index)
            assert torch.equal(weights.gate_up, state[f"{experts.path}.gate_up_proj"][index])
            assert torch.equal(weights.down, state[f"{experts.path}.down_proj"][index])
        seen |= {f"{experts.path}.gate_up_proj", f"{experts.path}.down_proj"}
    tied = {"lm_head.weight"} if family == "qwen2_moe" else set()
    assert seen == set(state) - tied


def test_shards_and_one_file_are_the_same_model(model_folder: Folder) -> None:
    whole, cut = model_folder(), model_folder(max_shard_size="100KB")
    assert len(Source(cut).files) > 1
    a, b = Source(whole).expert(1, 3), Source(cut).expert(1, 3)
    assert torch.equal(a.gate_up, b.gate_up) and torch.equal(a.down, b.down)


def test_loaded_leaves_nothing_behind(model_folder: Folder) -> None:
    source = Source(model_folder())
    prefix = source.layer_paths[0]
    with source.loaded(prefix):
        assert not source.current(f"{prefix}.self_attn.q_proj.weight").is_meta
        assert source.current("model.layers.1.self_attn.q_proj.weight").is_meta
        assert source.current(f"{source.experts[0].path}.gate_up_proj").is_meta
    assert source.current(f"{prefix}.self_attn.q_proj.weight").is_meta


def test_fingerprint_depends_on_config_and_weights(model_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder(), tmp_path / "copy")
    first = Source(model_folder()).fingerprint
    assert Source(folder).fingerprint == first
    state = load_file(folder / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in state.items()}, folder / "model.safetensors")
    assert Source(folder).fingerprint != first


def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_a_missing_shard_is_named(model_folder: Folder, tmp_path: Path) -> None:
    folder = broken(model_folder(max_shard_size="100KB"), tmp_path)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        Source(folder)


def test_a_truncated_file_is_named(model_folder: Folder, tmp_path: Path) -> None:
    folder = broken(model_folder(), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Source(folder)


def test_a_missing_tensor_is_named(model_folder: Folder, tmp_path: Path) -> None:
    folder = broken(model_folder(), tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.self_attn.k_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj"):
        Source(folder)


def test_a_missing_expert_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    folder = broken(model_folder(), tmp_path)
    state = load_file(folder / "model.safetensors")
    (key,) = [k for k in state if "layers.1." in k and "experts.3." in k and "w2" in k]
    del state[key]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="expert"):
        Source(folder)


def test_nan_weights_are_named(model_folder: Folder, tmp_path: Path) -> None:
    folder = broken(model_folder(), tmp_path)
    state = load_file(folder / "model.safetensors")
    (key,) = [k for k in state if "layers.1." in k and "experts.2." in k and "w1" in k]
    state[key][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    source = Source(folder)
    source.expert(1, 1)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        source.expert(1, 2)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no routed experts"):
        Source(tmp_path)


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "/nowhere/at/all"])
def test_a_missing_model_is_reported(name: str) -> None:
    with pytest.raises(InputError, match="folder"):
        Source(name)


def test_a_quantized_source_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    folder = broken(model_folder(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="already quantized"):
        Source(folder)


@pytest.mark.parametrize(
    ("dtype", "has", "device", "expected"),
    [
        ("bfloat16", "_is_avx512_bf16_supported", "cpu", "bfloat16"),
        ("bfloat16", "_is_amx_tile_supported", "cpu", "bfloat16"),
        ("bfloat16", "_is_amx_fp16_supported", "cpu", "float32"),
        ("float16", "_is_amx_fp16_supported", "cpu", "float16"),
        ("float16", "", "cpu", "float32"),
        ("bfloat16", "", "cuda", "bfloat16"),
        ("float32", "", "cpu", "float32"),
    ],
)
def test_16_bits_are_computed_with_where_the_machine_can(
    dtype: str, has: str, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has, raising=False)
    found = compute_dtype(getattr(torch, dtype), torch.device(device))
    assert found == getattr(torch, expected)


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_what_is_stored_is_of_the_models_dtype_whatever_is_computed_with(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    computed: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moepress.original.source.compute_dtype", lambda *_: computed)
    source = Source(model_folder(dtype="bfloat16"))
    assert source.dtype == torch.bfloat16 and source.expert(0, 1).down.dtype == computed
    with source.loaded(source.layer_paths[0]):
        name = "model.layers.0.input_layernorm.weight"
        assert source.current(name).dtype == computed
        assert torch.equal(source.current(name).bfloat16(), source.tensor(name))
    recipe = small_recipe(text_file, "default", bits=2.0, head_bits=16)
    out = compress(source.folder, tmp_path / "out", recipe)
    stored = {k: v for p in out.glob("model-*.safetensors") for k, v in load_file(p).items()}
    assert {v.dtype for v in stored.values()} == {torch.uint8, torch.bfloat16}
    for name in (n for n in source.all_names if stored[n].dtype != torch.uint8):
        assert torch.equal(stored[name], source.tensor(name)), name


def test_linears_without_weights_are_not_packed(tmp_path: Path) -> None:
    """Granite keeps them, with no rows, where its config has no shared experts."""
    model = make_model("granitemoehybrid", shared_intermediate_size=0)
    source = Source(save_model(model, tmp_path))
    empty = [name for name in source.all_names if not source.shape(name).numel()]
    packable = {name for linears in source.packable for name in linears}
    assert len(empty) == 6 and packable and not packable & set(empty)


@pytest.mark.parametrize("wide", ["model.embed_tokens.weight", "lm_head.weight"])
def test_without_a_dtype_in_the_config_it_is_what_transformers_takes(
    model_folder: Folder, tmp_path: Path, wide: str
) -> None:
    folder = Path(shutil.copytree(model_folder(dtype="bfloat16"), tmp_path / "copy"))
    state = load_file(folder / "model.safetensors")
    # float32 comes first in the file, whatever its name
    save_file({**state, wide: state[wide].float()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != "dtype"}))
    assert Source(folder).dtype == AutoModelForCausalLM.from_pretrained(folder).dtype
    save_file({k: v.double() for k, v in state.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"holds torch\.float64 weights"):
        Source(folder)


def test_the_dtype_of_a_composite_is_not_that_of_its_text(tmp_path: Path) -> None:
    folder = save_model(make_model("qwen3_vl_moe"), tmp_path / "original")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["dtype"]
    fields["text_config"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(fields))
    source = Source(folder)
    assert source.dtype == open_model("qwen3_vl_moe", folder).dtype == torch.float32
    assert source.config_json()["dtype"] == "float32"
