"""Options that several commands share, and the printing of their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

Device = Annotated[str, typer.Option(help="cpu, cuda, or one card of several, such as cuda:1.")]
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
        help="Drop experts: a share of those chosen (0.15), paper, a .json file, or 0 for none. "
        "Default: as stored in the folder.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory for weights, such as 12GB: experts that do not fit stay on disk, and are read "
        "when they are needed. all: read everything and lock it; mapped: leave it to the system. "
        "Default: mapped if the model fits, else most of the free memory.",
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


def pruning(text: str | None) -> Any:
    """The value of `--prune` as a `Strength` or `Pruning`; None: as stored in the folder."""
    from moepress.prune import parse_strength

    return None if text is None else parse_strength(text)


def memory_size(text: str | None) -> Any:
    """The value of `--memory` (store/memory.py); None: not given."""
    from moepress.store.memory import parse_memory

    return parse_memory(text)


def show(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], str]) -> None:
    """Print a result, as JSON or as the text that `table` makes of it."""
    typer.echo(json.dumps(result, indent=2) if as_json else table(result))
