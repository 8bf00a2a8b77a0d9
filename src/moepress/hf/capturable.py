"""Which models' steps can be captured, and what a graph takes from a model (captured.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moepress.errors import InputError
from moepress.kernels import backend_for
from moepress.kernels.divided import DividedExperts
from moepress.original.composite import decoder
from moepress.prune import ACTIVE, Pruned

OURS = ("moepress", "transformers")  # packages whose hooks compute, or act only where asked
SETTING = (bool, int, float, str)  # types of what `state_of` compares
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")  # of torch


def suits(model: Any, devices: Sequence[str]) -> bool:
    """Whether a model is whole on one device of those, and nothing reads what it computes."""
    device = model.device
    pruned = _pruned(model)
    return (
        device.type in devices
        and backend_for(device).name == device.type  # not the reference, which unpacks weights
        and "forward" not in vars(model)  # accelerate's
        and not model.training
        and not model.config.is_encoder_decoder
        and not (pruned is not None and pruned.counts)
        and all(parameter.device == device for parameter in model.parameters())
        and not any(
            isinstance(module, DividedExperts)
            or type(module).__module__.startswith("peft.")  # adapters: switched without a trace
            or hasattr(module, "_hf_hook")
            or (device.type != "cpu" and getattr(module, "stored", None) is not None)
            for module in model.modules()
        )
        and not _hooked(model)
    )


def _hooked(model: Any) -> bool:
    """Whether somebody watches or changes what modules inside of a model compute."""
    if any(getattr(torch.nn.modules.module, name) for name in GLOBAL_HOOKS):
        return True
    replaced = (vars(module).get("forward") for module in model.modules())
    # functools.wraps gives anybody's function the module of what it replaces; a class has its own.
    if any(
        forward is not None and not _is_from(forward, OURS[:1]) and not _is_from(type(forward))
        for forward in replaced
    ):
        return True
    hooks = (
        hook
        for module in model.modules()
        if module is not model  # its own hooks are called, as ever
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )
    return any(not _is_from(hook) for hook in hooks)


def _is_from(function: Any, packages: tuple[str, ...] = OURS) -> bool:
    """Whether a function, or a class of them, is defined in one of some packages."""
    return str(getattr(function, "__module__", "")).startswith(packages)


def state_of(model: Any) -> Any:
    """What a graph has taken from a model: weights, precision, pruning, threads, settings."""
    kind = model.device.type
    modules = list(model.modules())
    configs = {id(config): config for m in modules if (config := vars(m).get("config")) is not None}
    return (
        _pruned(model),
        torch.get_num_threads(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tuple((t.data_ptr(), t.dtype, t.shape) for t in (*model.parameters(), *model.buffers())),
        tuple(_settings(owner) for owner in (*modules, *configs.values())),
    )


def _settings(owner: Any) -> tuple[tuple[str, Any], ...]:
    """Attributes of a module or a config that Python code reads, such as a router's `top_k`."""
    return tuple((name, v) for name, v in vars(owner).items() if isinstance(v, SETTING))


def _pruned(model: Any) -> Pruned | None:
    """The pruning in force on a model."""
    try:
        found: Pruned | None = getattr(decoder(model), ACTIVE, None)
    except InputError:  # its layers are not where those of other models are: nothing prunes them
        return None
    return found
