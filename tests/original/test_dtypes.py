"""The dtypes that transformers loads a model in, by its own rules; transformers is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moepress.original.dtypes import loaded_dtypes


class Kept(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped
    """Names that patterns are found in, each in another way."""

    config_class = PreTrainedConfig
    _keep_in_fp32_modules_strict = ("gate.weight", "attn.*scale")
    _keep_in_fp32_modules = ("norm",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = nn.Linear(2, 2)  # of two parts
        self.shared_gate = nn.Linear(2, 2, bias=False)  # inside a part
        self.gate_proj = nn.Linear(2, 2, bias=False)  # not found
        self.attn = nn.Module()
        self.attn.inner = nn.Linear(2, 2)
        self.attn.inner.scale = nn.Parameter(torch.ones(2))  # with something between
        self.layernorm = nn.LayerNorm(2)  # not strict
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float32))  # by the class
        self.register_buffer("count", torch.ones(2, dtype=torch.long))
        self.post_init()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, {"gate.weight", "shared_gate.weight", "attn.inner.scale", "wide"}),
        (
            torch.float16,
            {"gate.weight", "shared_gate.weight", "attn.inner.scale", "wide"}
            | {"layernorm.weight", "layernorm.bias"},
        ),
    ],
)
def test_rules(dtype: torch.dtype, kept: set[str], tmp_path: Path) -> None:
    Kept(PreTrainedConfig()).save_pretrained(tmp_path)
    loaded = {
        k: v.dtype for k, v in Kept.from_pretrained(tmp_path, dtype=dtype).state_dict().items()
    }
    model = Kept._from_config(PreTrainedConfig(), dtype=dtype)
    found = loaded_dtypes(model, dtype)
    assert found == loaded
    assert {name for name, one in found.items() if one == torch.float32} == kept
    assert found["count"] == torch.long
    assert (
        loaded_dtypes(Kept(PreTrainedConfig()), torch.float32)["gate_proj.weight"] == torch.float32
    )
