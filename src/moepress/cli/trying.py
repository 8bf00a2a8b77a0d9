"""Commands to try moepress, and to check the machine it runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moepress.cli.options import AsJson, GpuMemory, Memory, gpu_memory_size, memory_size, show


def demo(
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder in which to keep the compressed model; default: not kept."),
    ] = None,
    bits: Annotated[float, typer.Option(help="Average code bits of the routed experts.")] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Compress, evaluate and run the small model that comes with moepress.

    It takes half a minute on two fast cores, more on slow ones.

    Example: moepress demo
    """
    from moepress.cli.tables import demo_table
    from moepress.demo import demo as run

    show(run(out, bits=bits), as_json, demo_table)


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Compressed folder: forecast how fast it runs here.")
    ] = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile all kernels, and compare every op with plain PyTorch on each device. It "
            "takes half a minute; for a new card, some minutes.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report what runs on this machine, what does not, and why. Exit code 1: a check failed.

    Example: moepress doctor mixtral-2.5bit --memory 8GB
    """
    from moepress.doctor import doctor as run
    from moepress.doctor import format_report
    from moepress.format.quantization import quantization_of

    if folder is not None:
        quantization_of(folder)  # raises for another folder, which is no fault of this machine
    report = run(folder, memory_size(memory) or "fit", gpu_memory_size(gpu_memory), kernels)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else format_report(report))
    if report.failed:
        raise typer.Exit(1)
