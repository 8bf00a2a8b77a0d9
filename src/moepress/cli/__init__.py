"""The command line: arguments in, one function call, results out. No logic lives here.

Results go to stdout, progress and warnings to stderr. Exit code 0: done, 1: the work failed,
2: something given was wrong. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moepress.cli import using
from moepress.cli.options import (
    AsJson,
    Device,
    checked_device,
    show,
)
from moepress.cli.recipe_options import (
    Bits,
    Bpw,
    Calib,
    ExpertCodec,
    Group,
    Length,
    Over,
    RecipeName,
    Seed,
    Sequences,
    Size,
    Widths,
    recipe_of,
)

app = typer.Typer(
    name="moepress",
    help="Compress Mixture-of-Experts language models to 1.5-3 bits per expert weight.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="Folder of the original model, or its hub id.")]


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make, or to go on with.")],
    bits: Bits = None,
    bpw: Bpw = None,
    size: Size = None,
    recipe: RecipeName = "default",
    calib: Calib = None,
    sequences: Sequences = None,
    sequence_length: Length = None,
    expert_bits: Widths = None,
    expert_codec: ExpertCodec = None,
    over: Over = None,
    group_size: Group = None,
    device: Device = "cpu",
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Without a budget: print JSON.")] = False,
) -> None:
    """Compress a model: score, allocate, quantize. Run again to continue a stopped run.

    Without a budget: score, then show what each budget costs and what fits in this machine.

    Example: moepress compress Mixtral-8x7B-v0.1 mixtral-2.5bit --bits 2.5 --calib text/
    """
    from moepress.cli.tables import proposal_table
    from moepress.compress import compress as run
    from moepress.propose import propose

    chosen = recipe_of(
        recipe, bits, bpw, size, calib, sequences, sequence_length, expert_bits, group_size, seed,
        expert_codec, over,
    )  # fmt: skip
    if chosen.has_budget:
        typer.echo(run(model, out, chosen, device=checked_device(device)))
        return
    found = propose(model, out, chosen, device=checked_device(device))
    show(found.to_dict(), as_json, proposal_table)


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
    recipe: RecipeName = "default",
    calib: Calib = None,
    sequences: Sequences = None,
    sequence_length: Length = None,
    device: Device = "cpu",
    seed: Seed = None,
) -> None:
    """Measure which experts the text chooses, with what weight, and what skipping them costs.

    Example: moepress calibrate Mixtral-8x7B-v0.1 routing.safetensors --calib text/
    """
    from moepress.calibrate import calibrate as run
    from moepress.original.source import Source

    chosen = recipe_of(
        recipe, None, None, None, calib, sequences, sequence_length, None, None, seed
    )
    run(Source(model, checked_device(device)), chosen).save(out)
    typer.echo(out)


@app.command()
def score(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Scores file to write (.safetensors).")],
    recipe: RecipeName = "default",
    calib: Calib = None,
    sequences: Sequences = None,
    sequence_length: Length = None,
    expert_bits: Widths = None,
    expert_codec: ExpertCodec = None,
    group_size: Group = None,
    device: Device = "cpu",
    seed: Seed = None,
) -> None:
    """Measure what every expert costs at every width. Run again to continue a stopped run.

    Example: moepress score Mixtral-8x7B-v0.1 scores.safetensors --calib text/
    """
    import shutil

    from moepress.score import score as run

    chosen = recipe_of(
        recipe, None, None, None, calib, sequences, sequence_length, expert_bits, group_size, seed,
        expert_codec,
    )  # fmt: skip
    work = out.with_name(out.name + ".work")
    run(model, chosen, work=work, device=checked_device(device)).save(out)
    shutil.rmtree(work)
    typer.echo(out)


@app.command()
def allocate(
    scores: Annotated[Path, typer.Argument(help="Scores file of `moepress score`.")],
    out: Annotated[Path, typer.Argument(help="Plan to write (.json).")],
    bits: Bits = None,
    bpw: Bpw = None,
    size: Size = None,
    expert_bits: Widths = None,
    over: Over = None,
    recipe: RecipeName = "default",
) -> None:
    """Choose the bits of every expert under a budget; seconds, from stored scores.

    Widths, unless given, are all that the scores hold.

    Example: moepress allocate scores.safetensors plan.json --size 16GB
    """
    from moepress.allocate import allocate as run
    from moepress.allocate import warn_of_left_out
    from moepress.costs.scores import ExpertScores
    from moepress.recipe import parse_widths

    measured = ExpertScores.load(scores)
    widths = {"expert_bits": parse_widths(expert_bits)} if expert_bits is not None else {}
    chosen = measured.recipe_for(recipe_of(recipe, bits, bpw, size, over=over), **widths)
    plan = run(measured, chosen)
    warn_of_left_out(measured, plan)
    plan.save(out)
    typer.echo(out)


@app.command()
def quantize(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Plan of `moepress allocate`.")],
    out: Annotated[Path, typer.Argument(help="Folder to make, or to go on with.")],
    device: Device = "cpu",
) -> None:
    """Apply a plan and write the compressed folder. Run again to continue a stopped run.

    Example: moepress quantize Mixtral-8x7B-v0.1 plan.json mixtral-2.5bit
    """
    from moepress.allocation.plan import BitAllocation
    from moepress.quantize import quantize as run

    typer.echo(run(model, BitAllocation.load(plan), out, device=checked_device(device)))


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Argument(help="Where to keep the compressed model; default: nowhere.")
    ] = None,
    bits: Annotated[float, typer.Option(help="Average code bits of the routed experts.")] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Compress, load, evaluate and run the small model that moepress carries.

    Example: moepress demo
    """
    from moepress.cli.tables import demo_table
    from moepress.demo import demo as run

    show(run(out, bits=bits), as_json, demo_table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what runs on this machine, and why not the rest.

    Example: moepress doctor
    """
    from moepress.doctor import doctor as run
    from moepress.doctor import format_report

    report = run()
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else format_report(report))


using.add_to(app)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    from moepress import __version__

    if version:
        typer.echo(f"moepress {__version__}")
        raise typer.Exit
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if quiet:
        from moepress.progress import set_verbosity

        set_verbosity("quiet")


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    from moepress.errors import InputError, MoepressError

    # Threads that wait for each other by spinning make small operations many times slower as soon
    # as anything else runs on the machine; sleeping at once costs a tenth of the speed of decoding.
    # A short spin, some ten microseconds, costs neither (docs/log.md, "Threads that spin").
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except MoepressError as error:
        typer.echo(f"moepress: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        typer.echo("moepress: stopped. Run the same command again to go on.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
