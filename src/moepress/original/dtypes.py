"""The dtypes of a model's tensors, stored and in computations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moepress.errors import InputError


def dtype_of_weights(name: str, config: Any, stored: torch.dtype) -> torch.dtype:
    """The dtype of a model: that of its config, or else of its files.

    Args:
        name: of the model, for messages.
        stored: of its files.

    Raises:
        InputError: it is none of weights that are not quantized.
    """
    # transformers does not look into the parts of a composite's config
    dtype: torch.dtype | None = config.dtype
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.itemsize == 1):
        dtype = stored  # some configs name the dtype of the codes
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"{name} holds {dtype} weights. Expected float32, bfloat16 or float16: give the "
            "original model, not a quantized one."
        )
    return dtype


def with_dtype(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a config.json that name the dtype of the model.

    Without it transformers takes the dtype of the first float in the files, and a compressed
    folder has other files than its original.
    """
    named = fields.get("dtype") or fields.get("torch_dtype")
    if isinstance(named, str) and getattr(torch, named, None) == dtype:
        return dict(fields)
    rest = {name: value for name, value in fields.items() if name != "torch_dtype"}
    return {**rest, "dtype": str(dtype).removeprefix("torch.")}


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute with: the model's, or float32 on CPUs without 16-bit products.

    On such CPUs a product of 16-bit numbers takes about eight times as long as one of float32
    (docs/log.md#float32-on-cpus).
    """
    native = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    if device.type != "cpu" or dtype not in native:
        return dtype
    probes = (getattr(torch.cpu, name, None) for name in native[dtype])
    return dtype if any(probe is not None and probe() for probe in probes) else torch.float32


def in_float32(model: Any, dtype: torch.dtype, name: str) -> bool:
    """Whether transformers keeps a parameter in float32 in 16-bit models of this class.

    The class's code then casts states to its dtype, also in a model of float32.

    Args:
        dtype: of the model.
    """
    from transformers.core_model_loading import build_glob_alternation

    half = torch.bfloat16 if dtype == torch.float32 else dtype
    plan: dict[str, torch.dtype] = model._get_dtype_plan(half)
    return bool(plan) and build_glob_alternation(list(plan))[0].search(name) is not None


def loaded_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes of all parameters and buffers of a model that transformers loads in `dtype`.

    transformers keeps in float32 what a pattern of `_keep_in_fp32_modules(_strict)` is found in,
    as a regular expression anywhere in the name, and what the class itself makes in float32.
    The search is transformers' own (core_model_loading.py).

    Args:
        model: made in `dtype`.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    patterns, names, _ = build_glob_alternation(list(plan))

    def loaded(name: str, declared: torch.dtype) -> torch.dtype:
        found = patterns.search(name) if plan else None
        if found is None or not declared.is_floating_point:
            return declared
        return plan[names[str(found.lastgroup)]]

    state = model.state_dict(keep_vars=True)
    return {name: loaded(name, value.dtype) for name, value in state.items()}
