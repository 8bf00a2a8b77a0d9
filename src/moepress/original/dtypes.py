"""The dtype that a model computes with on this machine."""

from __future__ import annotations

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
