"""The dtypes of a model's tensors, stored and in computations."""

from __future__ import annotations

from typing import Any

import torch


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


def kept_in_float32(model: Any, dtype: torch.dtype, name: str) -> bool:
    """Whether transformers keeps a parameter in float32, in a model of another dtype.

    Args:
        dtype: of the model.
    """
    keep: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(part in name.split(".") for part in keep)
