"""Device maps of transformers: which devices they name, and experts that stay on the CPU.

transformers counts the bytes of parameters as they are, packed, so its device maps are right. What
accelerate does with modules that a map leaves on the CPU beside a card is not: it copies their
weights to the card for every call, although a token needs few of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moepress.kernels.divided import packed_experts

PLACED_LATER = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps, by accelerate


def device_types(device_map: Any) -> set[str]:
    """Types of the devices that a device map of transformers names, or "disk"."""
    if device_map is None or (isinstance(device_map, str) and device_map in PLACED_LATER):
        card = torch.accelerator.current_accelerator(check_available=True)
        return {card.type if card is not None and device_map is not None else "cpu"}
    return {str(device).split(":")[0] for device in _named(device_map)}


def only_device(device_map: Any) -> torch.device | None:
    """The device that a device map puts a whole model on; None: there are several, or none yet."""
    if device_map is None or (isinstance(device_map, str) and device_map in PLACED_LATER):
        return None
    named = {str(device) for device in _named(device_map)}
    return torch.device(named.pop()) if len(named) == 1 and named != {"disk"} else None


def _named(device_map: Any) -> list[Any]:
    named = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return [f"cuda:{device}" if isinstance(device, int) else device for device in named]


def keep_experts_on_cpu(model: nn.Module) -> None:
    """Have experts run on the CPU that accelerate would copy from there for every call."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module

    for module in packed_experts(model).values():
        hook = getattr(module, "_hf_hook", None)
        for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if not isinstance(one, AlignDevicesHook) or not one.offload:
                continue
            if {device.type for device in one.original_devices.values()} == {"cpu"}:
                remove_hook_from_module(module, recurse=True)
                break
