"""Checks of tensor arguments that several ops share. Each raises InputError."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.errors import InputError


def check_bytes(name: str, packed: Tensor, expected: int) -> None:
    """Check the size of packed bytes: backends read them by address and must stay inside."""
    if packed.dtype != torch.uint8 or packed.shape != (expected,) or not packed.is_contiguous():
        raise InputError(
            f"The packed {name} must be [{expected}] uint8, contiguous; got {list(packed.shape)} "
            f"{packed.dtype}. docs/format.md describes the layout."
        )


def check_floats(x: Tensor) -> None:
    """Check that inputs are numbers: some code casts them to the dtype of a packed weight."""
    if not x.is_floating_point():
        raise InputError(
            f"A packed product got inputs of {x.dtype}. Expected floats: the model's code casts "
            "them to the dtype of the weight, which is packed bytes. It must stay unpacked."
        )


def check_one_device(first: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors are on the device of `first`: backends read them by address."""
    device = first.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise InputError(
                f"{name} is on {tensor.device}, the input on {device}. Move the model or the "
                "input, so that both are on one device."
            )
