"""A tiny model of each family that vLLM has: what vLLM writes is what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.compress import compress
from moepress.dequantize import dequantize
from tests.conftest import small_recipe
from tests.families.models import make_model, model_class, save_model
from tests.vllm.serving import differences, engine, written

pytestmark = pytest.mark.vllm

# By family: fields that differ from the tests of families without vLLM, whose attention on CPUs has
# heads of 32 or more.
HEADS = {"head_dim": 32}
MLA = {
    "topk_method": "noaux_tc",
    "head_dim": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "scoring_func": "sigmoid",  # as on the hub; transformers' class knows no other
}
LINEAR = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": HEADS,
    "qwen2_moe": {"hidden_size": 128},
    "deepseek_v3": MLA,
    "gpt_oss": HEADS,
    "qwen3_next": HEADS | LINEAR,
    "laguna": HEADS,  # sigmoid without groups, and a bias beside the experts
    "lfm2_moe": {"hidden_size": 128},  # queries in three dimensions, as of latent attention
    "axk1": MLA,
    "phimoe": {  # with a bias of the head; the noise and the window that vLLM's class assumes
        "hidden_size": 128,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
        "sliding_window": None,
    },
}
NAMES = {"phimoe": "PhiMoEForCausalLM"}  # of the class, as on the hub and in vLLM
# vLLM's linear attention on CPUs has bfloat16 only. Then near ties may be decided otherwise.
BFLOAT16 = ("qwen3_next",)
AGAINST_PLAIN = ("gpt_oss",)
PROMPTS = (5, 20, 33)  # tokens


def prompts() -> list[list[int]]:
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(2, 384, (n,), generator=chance).tolist() for n in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tokenizer_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = make_model(family, **FAMILIES[family])
    original = save_model(model, tmp_path / "original", tokenizer_folder)
    if family in NAMES:
        config = original / "config.json"
        fields = json.loads(config.read_text()) | {"architectures": [NAMES[family]]}
        config.write_text(json.dumps(fields))
    folder = compress(original, tmp_path / "packed", small_recipe(text_file, "fast", bits=2.5))
    dtype = "bfloat16" if family in BFLOAT16 else "float32"
    far = 0.1 if family in BFLOAT16 else 0.001
    with engine(folder, dtype=dtype) as llm:
        texts = written(llm, prompts(), 8)
    if family not in AGAINST_PLAIN:
        distance, gap = differences(folder, prompts(), texts)
        assert distance < far and gap < far
        return
    plain = model_class(family).from_pretrained(dequantize(folder, tmp_path / "dequantized"))
    model.load_state_dict(plain.state_dict())  # which is saved by the names of an original
    save_model(model, tmp_path / "plain", tokenizer_folder)
    with engine(tmp_path / "plain", dtype=dtype) as llm:
        again = written(llm, prompts(), 8)
    assert [text.ids for text in texts] == [text.ids for text in again]
    logprobs = (torch.tensor([text.logprobs for text in each]) for each in (texts, again))
    torch.testing.assert_close(*logprobs, rtol=0, atol=far)
