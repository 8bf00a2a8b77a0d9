"""Arguments and options that several commands have, and how their results are shown."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
ActivationBits = Annotated[
    int, typer.Option(help="Precision of activations in packed products: 8, or 16 to keep it.")
]
Prune = Annotated[
    str | None,
    typer.Option(
        "--prune",
        help="Skip experts: a share of those chosen (0.15), paper, a .json file, or 0 for none. "
        "Default: as the folder says.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def checked_device(name: str) -> str:
    """A device that exists here.

    Raises:
        InputError: it does not.
    """
    import torch

    from moepress.errors import InputError

    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"Device '{name}' is not available here. Expected cpu, or cuda on a GPU.")
    return name


def pruning(text: str | None) -> Any:
    """What `--prune` asks for; None: nothing, the folder decides."""
    from moepress.prune import parse_strength

    return None if text is None else parse_strength(text)


def show(result: dict[str, Any], as_json: bool, table: Any) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else table(result))
