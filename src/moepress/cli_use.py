"""Commands that use a compressed folder: look at it, and let it write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moepress.cli_options import ActivationBits, Device, checked_device

Folder = Annotated[Path, typer.Argument(help="Compressed folder.")]
Scores = Annotated[
    Path | None, typer.Option(help="Scores of its plan, if they are not in the folder.")
]


def add_to(app: typer.Typer) -> None:
    """Make the functions of this module commands of the command line."""
    for command in (generate, report, plot):
        app.command()(command)


def generate(
    model: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 64,
    device: Device = "cpu",
    activation_bits: ActivationBits = 8,
) -> None:
    """Continue a text, greedily.

    Example: moepress generate mixtral-2.5bit "Once upon a time" --tokens 100
    """
    from moepress.generate import generate as run

    text = run(
        model, prompt, tokens=tokens, device=checked_device(device), activation_bits=activation_bits
    )
    typer.echo(text)


def report(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: moepress_report.html in it.")
    ] = None,
    scores: Scores = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="File of `moepress evaluate --out`, if it is not in the folder."),
    ] = None,
) -> None:
    """Write one page that shows what happened to the model: open it in any browser.

    Example: moepress report mixtral-2.5bit
    """
    from moepress.report import report as run

    typer.echo(run(folder, out, scores=scores, evaluation=evaluation))


def plot(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    form: Annotated[str, typer.Option("--format", help="svg or png.")] = "svg",
    scores: Scores = None,
) -> None:
    """Write the pictures of the report as files.

    Example: moepress plot mixtral-2.5bit pictures/ --format png
    """
    from moepress.report import plot as run

    for path in run(folder, out, form=form, scores=scores):
        typer.echo(path)
