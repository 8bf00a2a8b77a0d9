"""Prompts with an image: vLLM writes what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moepress.compress import compress
from tests.conftest import small_recipe
from tests.families.composites import rope
from tests.families.models import make_model, save_model
from tests.vllm.processors import save_processor
from tests.vllm.serving import differences, engine, written

pytestmark = pytest.mark.vllm

# Fields of configs on the hub that transformers' classes have not, and vLLM reads. They have no
# sliding window, which vLLM applies to Qwen3-VL and transformers does not.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {"norm_topk_prob": True, "sliding_window": None, **rope(6, 5, 5)},
    "glm4v_moe": {"use_qk_norm": False, **rope(4, 2, 2, partial_rotary_factor=0.5)},
}
IMAGES = {"image": 1, "video": 0}
TEXT = [[80, 119, 219, 18, 203], list(range(100, 133))]


@pytest.mark.parametrize("family", FAMILIES)
def test_image(family: str, tokenizer_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    pytest.importorskip("torchvision", exc_type=Exception)
    model = make_model(family, head_dim=32, **FAMILIES[family])
    original = save_model(model, tmp_path / "original")
    save_processor(family, original)
    folder = compress(original, tmp_path / "packed", small_recipe(text_file, "fast", bits=2.5))
    processor = AutoProcessor.from_pretrained(folder)
    prompt = f"def {processor.image_token} f1(x):"
    images = [_noise(seed) for seed in (0, 1)]
    asked = [{"prompt": prompt, "multi_modal_data": {"image": one}} for one in images]
    with engine(folder, limit_mm_per_prompt=IMAGES) as llm:
        texts, seen = written(llm, TEXT, 8), written(llm, asked, 8)
    inputs = [processor(text=[prompt], images=[one], return_tensors="pt") for one in images]
    assert max(differences(folder, TEXT, texts)) < 0.02
    assert max(differences(folder, inputs, seen)) < 0.05  # last bits of the tower change a code
    assert seen[0].logprobs != seen[1].logprobs


def _noise(seed: int) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(numbers)
