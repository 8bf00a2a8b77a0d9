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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moepress import cli_use
from moepress.cli_options import (
    ActivationBits,
    AsJson,
    Device,
    Prune,
    checked_device,
    pruning,
    show,
)

if TYPE_CHECKING:
    from moepress.recipe import Recipe

app = typer.Typer(
    name="moepress",
    help="Compress Mixture-of-Experts language models to 1.5-3 bits per expert weight.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="Folder of the original model, or its hub id.")]
Bits = Annotated[
    float | None, typer.Option(help="Budget: average code bits of the routed experts.")
]
Bpw = Annotated[float | None, typer.Option(help="Budget: stored bits per weight, everything.")]
Size = Annotated[str | None, typer.Option(help="Budget: bytes of the folder, such as 16GB.")]
RecipeName = Annotated[
    str, typer.Option(help="default, fast, paper, paper-released, or a .toml or .json file.")
]
Calib = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibration text as PATH[=WEIGHT]: a text or .jsonl file, a folder, c4, wikitext2, "
        "math, stdlib, or self (the model's own samples). Repeatable."
    ),
]
Sequences = Annotated[int | None, typer.Option(help="Calibration sequences.")]
Length = Annotated[int | None, typer.Option("--sequence-length", help="Tokens of each.")]
Widths = Annotated[
    str | None, typer.Option("--expert-bits", help="Widths offered to experts, such as 1,2,3.")
]
ExpertCodec = Annotated[
    str | None, typer.Option(help="How experts are stored: int (scalar grids) or trellis.")
]
Over = Annotated[
    str | None,
    typer.Option(help="Whose loss is kept small: mean (all calibration text) or worst (source)."),
]
Group = Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.")]


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
    from moepress.compress import compress as run
    from moepress.propose import propose
    from moepress.tables import proposal_table

    chosen = _recipe(
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
    from moepress.source import Source

    chosen = _recipe(recipe, None, None, None, calib, sequences, sequence_length, None, None, seed)
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

    chosen = _recipe(
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
    over: Over = None,
    recipe: RecipeName = "default",
) -> None:
    """Choose the bits of every expert under a budget; seconds, from stored scores.

    Example: moepress allocate scores.safetensors plan.json --size 16GB
    """
    from moepress.allocate import allocate as run
    from moepress.score import ExpertScores

    measured = ExpertScores.load(scores)
    chosen = measured.recipe_for(_recipe(recipe, bits, bpw, size, over=over))
    run(measured, chosen).save(out)
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
    from moepress.allocate import BitAllocation
    from moepress.quantize import quantize as run

    typer.echo(run(model, BitAllocation.load(plan), out, device=checked_device(device)))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed folder or original model.")],
    text: Annotated[list[str], typer.Option(help="Text to predict. Repeatable.")],
    against: Annotated[str | None, typer.Option(help="Original model to compare with.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Windows per text; all by default.")] = None,
    device: Device = "cpu",
    activation_bits: ActivationBits = 8,
    generations: Annotated[
        int, typer.Option(help="Texts to continue, to see whether the model loops; 0: none.")
    ] = 16,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second and memory.")] = True,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Zero-shot tasks of lm-eval (moepress[eval]), such as piqa,gsm8k, or paper: the "
            "eight of arXiv:2410.06270. Repeatable."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your own task definitions (.yaml).")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Examples of each task.")] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let tasks run code that the model writes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write too, for `moepress report`.")
    ] = None,
    prune: Prune = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity, KL divergence from the original, loops, speed, memory, zero-shot tasks.

    Example: moepress evaluate mixtral-2.5bit --against Mixtral-8x7B-v0.1 --text wiki.txt
    """
    from moepress.evaluate import evaluate as run
    from moepress.tables import evaluation_table

    result = run(
        model,
        text,
        against=against,
        length=length,
        limit=limit,
        device=checked_device(device),
        activation_bits=activation_bits,
        generations=generations,
        speed=speed,
        tasks=tasks or (),
        include_path=include_path,
        task_limit=task_limit,
        run_code=run_code,
        pruning=pruning(prune),
    )
    if out is not None:
        result.save(out)
    show(result.to_dict(), as_json, evaluation_table)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder or file of ours, or an original model.")],
    as_json: AsJson = False,
) -> None:
    """Say what a file or folder holds.

    Example: moepress inspect mixtral-2.5bit --json
    """
    from moepress.inspect import inspect as run
    from moepress.tables import nested_table

    show(run(path), as_json, nested_table)


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Compressed folder, changed in place.")],
    strength: Annotated[
        str,
        typer.Argument(
            help="Share of the chosen experts to skip (0.15), paper, a .json file, or 0 for none."
        ),
    ],
    protect: Annotated[
        float | None,
        typer.Option(help="Share of a prompt's tokens that keep all experts; 0.02 by default."),
    ] = None,
) -> None:
    """Have a compressed folder skip experts whenever it is opened, by any program.

    Example: moepress prune mixtral-2.5bit 0.15
    """
    from moepress.prune import parse_strength, set_pruning

    set_pruning(model, parse_strength(strength), protect)
    typer.echo(model)


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
    from moepress.demo import demo as run
    from moepress.tables import demo_table

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


cli_use.add_to(app)


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


def _recipe(
    name: str,
    bits: float | None,
    bpw: float | None,
    size: str | None,
    calib: list[str] | None = None,
    sequences: int | None = None,
    sequence_length: int | None = None,
    expert_bits: str | None = None,
    group_size: int | None = None,
    seed: int | None = None,
    expert_codec: str | None = None,
    over: str | None = None,
) -> Recipe:
    """The named recipe with what the options change."""
    from moepress.data import parse_source
    from moepress.recipe import Recipe, parse_size, parse_widths

    changes: dict[str, Any] = {
        "bits": bits,
        "bpw": bpw,
        "size": parse_size(size) if size is not None else None,
        "calib": tuple(parse_source(text) for text in calib) if calib else None,
        "sequences": sequences,
        "sequence_length": sequence_length,
        "expert_bits": parse_widths(expert_bits) if expert_bits is not None else None,
        "group_size": group_size,
        "seed": seed,
        "expert_codec": expert_codec,
        "over": over,
    }
    return Recipe.load(name, **{k: v for k, v in changes.items() if v is not None})


if __name__ == "__main__":
    main()
