"""Commands that make a compressed model: the whole pipeline, and its stages one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moepress.cli.options import DeviceToCompress, TrustRemoteCode, device_to_compress, show
from moepress.cli.recipe_options import (
    Bits,
    Bpw,
    Calib,
    ExpertCodec,
    Group,
    Length,
    Over,
    RecipeName,
    ScoreTokens,
    Seed,
    Sequences,
    Size,
    Widths,
    WidthsOfScores,
    recipe_of,
)

Model = Annotated[str, typer.Argument(help="Folder of the original model, or its hub id.")]
Out = Annotated[Path, typer.Argument(help="Folder to make, or to continue.")]


def compress(
    model: Model,
    out: Out,
    bits: Bits = None,
    bpw: Bpw = None,
    size: Size = None,
    recipe: RecipeName = "default",
    calib: Calib = None,
    sequences: Sequences = None,
    sequence_length: Length = None,
    score_tokens: ScoreTokens = None,
    expert_bits: Widths = None,
    expert_codec: ExpertCodec = None,
    over: Over = None,
    group_size: Group = None,
    device: DeviceToCompress = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate time, peak memory and disk, check the input, and write nothing.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Without a budget, or with --dry-run: print JSON.")
    ] = False,
) -> None:
    """Compress a model: score, allocate, quantize. Run again to continue a stopped run.

    Without a budget: score, then show what each budget costs and what fits in this machine.

    Example: moepress compress Mixtral-8x7B-v0.1 mixtral-2.5bit --bits 2.5 --calib text/
    """
    from moepress.cli.tables import estimate_table, proposal_table
    from moepress.compress import compress as run
    from moepress.estimate import estimate
    from moepress.propose import propose

    chosen = recipe_of(
        recipe,
        bits=bits,
        bpw=bpw,
        size=size,
        calib=calib,
        sequences=sequences,
        sequence_length=sequence_length,
        score_tokens=score_tokens,
        expert_bits=expert_bits,
        expert_codec=expert_codec,
        over=over,
        group_size=group_size,
        seed=seed,
    )
    device = device_to_compress(device, model)
    if dry_run:
        expected = estimate(model, out, chosen, device=device, trust_remote_code=trust_remote_code)
        show(expected.to_dict(), as_json, estimate_table)
    elif chosen.has_budget:
        typer.echo(run(model, out, chosen, device=device, trust_remote_code=trust_remote_code))
    else:
        found = propose(model, out, chosen, device=device, trust_remote_code=trust_remote_code)
        show(found.to_dict(), as_json, proposal_table)


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
    recipe: RecipeName = "default",
    calib: Calib = None,
    sequences: Sequences = None,
    sequence_length: Length = None,
    device: DeviceToCompress = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure which experts tokens choose, with what weight, and what dropping them costs.

    Example: moepress calibrate Mixtral-8x7B-v0.1 routing.safetensors --calib text/
    """
    from moepress.calibrate import calibrate as run
    from moepress.original.source import Source
    from moepress.writing.files import check_file

    chosen = recipe_of(
        recipe, calib=calib, sequences=sequences, sequence_length=sequence_length, seed=seed
    )
    check_file(out, "a calibration")
    run(Source(model, device_to_compress(device, model), trust_remote_code), chosen).save(out)
    typer.echo(out)


def score(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Scores file to write (.safetensors).")],
    recipe: RecipeName = "default",
    calib: Calib = None,
    sequences: Sequences = None,
    sequence_length: Length = None,
    score_tokens: ScoreTokens = None,
    expert_bits: Widths = None,
    expert_codec: ExpertCodec = None,
    group_size: Group = None,
    device: DeviceToCompress = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what every expert costs at every width. Run again to continue a stopped run.

    Example: moepress score Mixtral-8x7B-v0.1 scores.safetensors --calib text/
    """
    from moepress.score import score_to_file

    chosen = recipe_of(
        recipe,
        calib=calib,
        sequences=sequences,
        sequence_length=sequence_length,
        score_tokens=score_tokens,
        expert_bits=expert_bits,
        expert_codec=expert_codec,
        group_size=group_size,
        seed=seed,
    )
    score_to_file(
        model,
        chosen,
        out,
        device=device_to_compress(device, model),
        trust_remote_code=trust_remote_code,
    )
    typer.echo(out)


def allocate(
    scores: Annotated[Path, typer.Argument(help="Scores file of `moepress score`.")],
    out: Annotated[Path, typer.Argument(help="Plan to write (.json).")],
    bits: Bits = None,
    bpw: Bpw = None,
    size: Size = None,
    expert_bits: WidthsOfScores = None,
    over: Over = None,
    recipe: RecipeName = "default",
) -> None:
    """Choose the bits of every expert under a budget, from stored scores. Takes seconds.

    Example: moepress allocate scores.safetensors plan.json --size 16GB
    """
    from moepress.allocate import allocate as run
    from moepress.allocate import warn_of_left_out
    from moepress.costs.scores import ExpertScores
    from moepress.recipe import parse_widths
    from moepress.writing.files import check_file

    check_file(out, "a plan")
    measured = ExpertScores.load(scores)
    widths = {"expert_bits": parse_widths(expert_bits)} if expert_bits is not None else {}
    wanted = recipe_of(recipe, bits=bits, bpw=bpw, size=size, over=over)
    plan = run(measured, measured.recipe_for(wanted, **widths))
    warn_of_left_out(measured, plan)
    plan.save(out)
    typer.echo(out)


def quantize(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="Plan of `moepress allocate`.")],
    out: Out,
    device: DeviceToCompress = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Apply a plan and write the compressed folder. Run again to continue a stopped run.

    Example: moepress quantize Mixtral-8x7B-v0.1 plan.json mixtral-2.5bit
    """
    from moepress.allocation.plan import BitAllocation
    from moepress.quantize import quantize as run

    made = run(
        model,
        BitAllocation.load(plan),
        out,
        device=device_to_compress(device, model),
        trust_remote_code=trust_remote_code,
    )
    typer.echo(made)
