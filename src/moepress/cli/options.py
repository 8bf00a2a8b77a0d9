"""Options that several commands share, and the printing of their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

DeviceToCompress = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, or one card of several, such as cuda:1. Default: a card on which the "
        "largest layer fits, else cpu.",
    ),
]
DeviceToRun = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, or one card of several, such as cuda:1. Default: a card on which the "
        "model fits, else cpu; cuda with --gpu-memory, cpu with --memory.",
    ),
]
ActivationBits = Annotated[
    int,
    typer.Option(
        help="Bits of the activations inside packed matrix products: 8, or 16 for more precision."
    ),
]
Prune = Annotated[
    str | None,
    typer.Option(
        "--prune",
        help="Drop experts: a share of those chosen (0.15), paper, a .json file, 0 for none, or "
        "disk:0.15 where experts are on disk. Default: as stored in the folder.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory for weights, such as 12GB: experts that do not fit stay on disk, and are read "
        "when they are needed. all: read everything and lock it; mapped: leave it to the system; "
        "fit, the default: mapped if the model fits, else most of the free memory.",
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory of the card for weights, such as 20GB of a 24 GB card: the experts that are "
        "chosen most often are there, and the others run on the CPU. Default: all of them if the "
        "model fits, else most of the card's free memory.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code in the model's folder, where transformers has no class for the model.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def checked_device(name: str) -> str:
    """The name of a device.

    Raises:
        InputError: this machine has no such device.
    """
    import torch

    from moepress.errors import InputError

    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in ("cpu", *cards) and not (name == "cuda" and cards):
        here = (
            f"Expected cpu, cuda, or one of {cards}."
            if cards
            else ("Expected cpu: torch finds no CUDA card here, `moepress doctor` may say why.")
        )
        raise InputError(f"Device '{name}' is not available here. {here}")
    return name


def device_to_compress(name: str | None, model: str | Path) -> str:
    """The device that compresses a model: that of the user, else one chosen and told."""
    from moepress import devices
    from moepress.original.folder import resolve
    from moepress.ranks import here

    if here().count > 1:
        return _told(devices.of_rank(name, resolve(model)))
    if name is not None:
        return checked_device(name)
    return _told(devices.to_compress(resolve(model)) if devices.cards() else "cpu")


def device_to_run(
    name: str | None, model: str | Path, memory: str | None, gpu_memory: str | None
) -> str:
    """The device that runs a model: that of the user, else one chosen; it is told."""
    from moepress import devices
    from moepress.original.folder import resolve

    if name is None and gpu_memory is not None:
        name = "cuda"
    if name is not None:
        return _told(checked_device(name))
    on_cpu = memory is not None or not devices.cards()
    return _told("cpu" if on_cpu else devices.to_run(resolve(model)))


def _told(device: str) -> str:
    from moepress import devices
    from moepress.progress import announce

    announce("device", lambda: devices.describe(device))
    return device


def pruning(text: str | None) -> Any:
    """The value of `--prune` as a `Strength` or `Pruning`; None: as stored in the folder."""
    from moepress.prune import parse_strength

    return None if text is None else parse_strength(text)


def gpu_memory_size(text: str | None) -> int | None:
    """The value of `--gpu-memory` in bytes; None: not given."""
    from moepress.store.memory import parse_gpu_memory

    return parse_gpu_memory(text)


def memory_size(text: str | None) -> Any:
    """The value of `--memory` (store/memory.py); None: not given."""
    from moepress.store.memory import parse_memory

    return parse_memory(text)


def show(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], str]) -> None:
    """Print a result, as JSON or as the text that `table` makes of it."""
    typer.echo(json.dumps(result, indent=2) if as_json else table(result))
