"""Tiny models of every Mixture-of-Experts family, in folders as the hub has them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moepress.hf.mend import mend
from tests.families.causal import CAUSAL
from tests.families.composites import AUDIO, COMPOSITES, ENCODER_SIZES, IMAGE, TEXT_ONLY, VIDEO
from tests.families.sizes import DROP, SIZES, tiny_fields
from tests.families.versions import why_not

SHARD = "150KB"  # of a checkpoint: several files for each model
SPREAD = 3.0  # times the standard deviation of transformers' initial weights
ROUTERS = ("gate", "router")  # last part of the paths of modules that choose experts

TOKENS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of a family's tiny model.

    Skips the test where this transformers has no such family that works.

    Args:
        family: model type, a key of `CAUSAL`, `COMPOSITES` or `TEXT_ONLY`.
        changes: fields of the (text) config to set otherwise.
    """
    from transformers import AutoConfig

    _skip_without(family)
    defaults = AutoConfig.for_model(family).to_dict()
    if family not in COMPOSITES:
        fields = {**CAUSAL, **TEXT_ONLY}[family]
        return AutoConfig.for_model(family, **tiny_fields(defaults, {**fields, **changes}))
    parts = COMPOSITES[family]
    fields = {
        "text_config": tiny_fields(defaults["text_config"], {**parts.text, **changes}),
        "vision_config": _encoder(defaults.get("vision_config"), parts.vision),
        "audio_config": _encoder(defaults.get("audio_config"), parts.audio),
        **_placeholders(defaults),
    }
    given = {n: v for n, v in fields.items() if n in defaults and v is not None} | dict(parts.own)
    return AutoConfig.for_model(family, **given)


def _skip_without(family: str) -> None:
    reason = why_not(family)
    if reason:
        pytest.skip(reason)


def _encoder(
    defaults: Mapping[str, Any] | None, changes: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Fields of the config of an encoder of images or sound; None: there is none."""
    if defaults is None:
        return None
    fields = {n: v for n, v in ENCODER_SIZES.items() if n in defaults}
    parts = {n: _encoder(v, {}) for n, v in defaults.items() if n.endswith("_config")}
    model_type = {"model_type": defaults["model_type"]} if "model_type" in defaults else {}
    made = model_type | fields | {n: v for n, v in parts.items() if v} | dict(changes)
    return {n: v for n, v in made.items() if v is not DROP}


def _placeholders(defaults: Mapping[str, Any]) -> dict[str, int]:
    """Ids of tokens that stand for images and sound, and of those around them."""
    names = [n for n in defaults if n.endswith(("_token_id", "_token_index"))]
    return {
        name: TOKENS.get(name.rsplit("_token_", 1)[0], 370 + place)
        for place, name in enumerate(names)
        if name not in SIZES
    }


def model_class(family: str) -> Any:
    """transformers' class of a family: the one that config.json on the hub names.

    Skips the test where this transformers has none that works.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    _skip_without(family)
    maps = ["MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM"]
    for name in maps[1:] if family in COMPOSITES else maps:
        found = getattr(modeling_auto, f"{name}_MAPPING_NAMES").get(family)
        if found is not None:
            return getattr(transformers, found)
    raise KeyError(family)


def open_model(family: str, folder: Path) -> Any:
    """The model of a folder, of transformers' class of the family, in eval mode.

    Where that class has a fault that moepress knows, it is mended.
    """
    model = model_class(family).from_pretrained(folder).eval()
    mend(model)
    return model


def make_model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of a family with random weights.

    They are spread so that routers choose different experts and that experts differ. Float32, in
    eval mode.

    Args:
        changes: see `tiny_config`.
    """
    torch.manual_seed(seed)
    model = model_class(family)._from_config(tiny_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, value in module.named_parameters(recurse=False):
                _spread(path, name, value)
            for name, value in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set and name.endswith("bias"):
                    value.add_(0.1 * torch.randn(value.shape))  # correction of the router's choice
    mend(model)
    return model.eval()


def _spread(path: str, name: str, value: Tensor) -> None:
    """Change an initial parameter: none is constant, rows differ in size, routers are decided."""
    if value.dim() < 2 or value.numel() == 0:
        value.add_(0.05 * torch.randn(value.shape))
        return
    if float(value.std()) == 0:
        value.add_(0.05 * torch.randn(value.shape))
    rows = torch.exp(0.3 * torch.randn(*value.shape[:-1], 1))
    decided = 4.0 if path.rsplit(".", 1)[-1] in ROUTERS or "router" in name else 1.0
    value.mul_(SPREAD * decided * rows)


def save_model(model: Any, folder: Path, tokenizer: Path | None = None) -> Path:
    """Save a model as the hub has it: several files, tensors named and divided as they were first.

    Args:
        tokenizer: folder of a tokenizer to add.
    """
    model.config.dtype = model.dtype
    model.save_pretrained(folder, max_shard_size=SHARD)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    return folder
