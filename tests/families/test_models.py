"""The tiny models: none of transformers' families is missing, and each is as the tests need it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from moepress.hf.mend import mend
from moepress.inspect import inspect
from tests.families.models import make_model, model_class, save_model
from tests.families.sizes import VOCAB
from tests.families.state import COMPRESS, EXPECTED, FAMILIES, NOT_COMPRESSED, TESTED_APART
from tests.families.versions import TESTED, installed

MAPS = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM")
# Class names of expert blocks. Shared experts alone make no Mixture of Experts.
BLOCK = re.compile(r"^class \w+(Experts|MoE|Moe|MoeBlock)\(", re.MULTILINE)


def moe_types() -> Iterator[str]:
    """Model types of transformers' maps whose own or whose text model's code has expert blocks."""
    import transformers
    from transformers.models.auto import modeling_auto

    code = Path(transformers.__file__).parent
    modules = transformers._class_to_module
    for name in MAPS:
        for model_type, found in getattr(modeling_auto, f"{name}_MAPPING_NAMES").items():
            for one in [found] if isinstance(found, str) else found:
                path = code / (modules.get(one, "").replace(".", "/") + ".py")
                if path.is_file() and BLOCK.search(path.read_text()):
                    yield model_type


def test_no_family_is_missing() -> None:
    here = {*FAMILIES, *NOT_COMPRESSED, *TESTED_APART}
    elsewhere = {"kimi_k25", "nemotron_h_omni", "nemo_speechlm"}  # code of another family's experts
    if installed() < TESTED:
        here &= {*CONFIG_MAPPING}
        elsewhere &= here
    assert set(moe_types()) | elsewhere == here


def ids(seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB - 16, (2, 40), generator=torch.Generator().manual_seed(seed))


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same(family: str, tmp_path: Path) -> None:
    model: Any = make_model(family)
    save_model(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = model_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(input_ids=ids()).logits
        mend(again)
        same = again.eval()(input_ids=ids()).logits
        # Sums may run in another order where weights lie elsewhere in memory.
        torch.testing.assert_close(same, logits, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01
    # longcat_flash has rows of gate_up_proj for its identity experts, which nothing uses.
    if (family, COMPRESS) not in EXPECTED and family != "longcat_flash":
        described = inspect(tmp_path)
        weights = {value.data_ptr(): value.numel() for value in again.state_dict().values()}
        assert described["expert_weights"] + described["other_weights"] == sum(weights.values())
