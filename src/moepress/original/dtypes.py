"""The dtypes of a model's tensors, stored and in computations."""

from __future__ import annotations

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
    configs = (config, config.get_text_config())
    dtype = next((one.dtype for one in configs if getattr(one, "dtype", None)), None)
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.itemsize == 1):
        dtype = stored  # some configs name the dtype of the codes
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"{name} holds {dtype} weights. Expected float32, bfloat16 or float16: give the "
            "original model, not a quantized one."
        )
    return dtype


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
