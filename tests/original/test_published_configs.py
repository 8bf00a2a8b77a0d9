"""config.json as publishers write it: older names of fields, other fields, names of code.

The oracle is transformers' own class. It reads the same file, except of Kimi-K2, whose model type
it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepress.compress import compress
from moepress.original.source import Source
from moepress.original.usable import check_usable
from moepress.original.walk import Walk
from moepress.progress import Progress
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model

IDS = torch.randint(2, 360, (2, 96), generator=torch.Generator().manual_seed(0))
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "type": "yarn",
}
DEEPSEEK = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
# Family, and fields that are set; None: absent.
CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V3": (
        "deepseek_v3",
        {"rope_scaling": YARN, "auto_map": DEEPSEEK, "ep_size": 1, "aux_loss_alpha": 0.001},
    ),
    "Kimi-K2": (
        "deepseek_v3",
        {"rope_scaling": YARN, "auto_map": DEEPSEEK, "model_type": "kimi_k2"},
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 64,
                "rope_type": "yarn",
                "truncate": False,
            },
            "initial_context_length": 64,
        },
    ),
    "Llama 4": (
        "llama4_text",
        {
            "rope_scaling": {
                "factor": 16.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            }
        },
    ),
    "Phi-3.5-MoE": (
        "phimoe",
        {
            "rope_scaling": {
                "long_factor": [2.0] * 8,
                "short_factor": [1.5] * 8,
                "long_mscale": 1.24,
                "short_mscale": 1.24,
                "original_max_position_embeddings": 64,
                "type": "longrope",
            },
            "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"},
        },
    ),
    "Hunyuan": (
        "hunyuan_v1_moe",
        {
            "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "factor": 1.0, "type": "dynamic"},
            "moe_topk": [2] * 3,
            "moe_intermediate_size": [32] * 3,
        },
    ),
    "Qwen3": ("qwen3_moe", {"rope_scaling": None, "sliding_window": None, "max_window_layers": 3}),
    "linear": ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "dynamic": ("mixtral", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "code beside a class": ("mixtral", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}),
}
USUAL = ("Kimi-K2", "code beside a class")


def published(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config as transformers 4 wrote them, changed."""
    rope = fields.pop("rope_parameters", None) or {}
    old = {"torch_dtype": fields.pop("dtype"), "rope_theta": rope.get("rope_theta", 10000.0)}
    return {**fields, **old, "transformers_version": "4.40.0", **changes}


def write(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    "name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.families) for n in CONFIGS]
)
def test_it_is_the_model_that_transformers_opens(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    folder = save_model(make_model(family), tmp_path)
    (folder / "modeling_own.py").write_text("raise RuntimeError('this code was run')\n")
    fields = published(json.loads((folder / "config.json").read_text()), changes)
    write(folder, fields)
    source = Source(folder)
    check_usable(source)
    walk = Walk(source, IDS)
    with Progress("walk", total=len(source.layers)) as progress:
        walk.finish(progress)
    found = torch.cat([batch.clone() for _, batch in walk.logits()])
    if name == "Kimi-K2":
        write(folder, {**fields, "model_type": family})
    torch.testing.assert_close(found, logits(folder), rtol=1e-4, atol=1e-4)
    write(folder, source.config_json())
    torch.testing.assert_close(found, logits(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, torch.float32),
        ({"torch_dtype": None}, torch.float32),  # of the files
        ({}, torch.float32),
    ],
)
def test_the_dtype_is_the_one_that_the_config_names(
    fields: dict[str, Any], expected: torch.dtype, tmp_path: Path
) -> None:
    folder = save_model(make_model("mixtral"), tmp_path)
    config = published(json.loads((folder / "config.json").read_text()), {})
    del config["torch_dtype"]
    write(folder, {**config, **fields})
    assert Source(folder).dtype == expected


def test_a_folder_made_from_kimi_k2_opens_without_its_code(
    tmp_path: Path, tokenizer_folder: Path, text_file: Path
) -> None:
    folder = save_model(make_model("deepseek_v3"), tmp_path / "original", tokenizer_folder)
    fields = published(json.loads((folder / "config.json").read_text()), CONFIGS["Kimi-K2"][1])
    write(folder, fields)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3"
    assert "auto_map" not in written
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert not any(info.values())
