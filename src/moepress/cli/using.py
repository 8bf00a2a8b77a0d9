"""Commands that use a compressed folder: evaluate it, look at it, run it."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from moepress._threads import lengthen_spin
from moepress.cli.options import (
    ActivationBits,
    AsJson,
    DeviceToRun,
    GpuMemory,
    Memory,
    Prune,
    TrustRemoteCode,
    device_to_run,
    gpu_memory_size,
    memory_size,
    pruning,
    show,
)

Folder = Annotated[Path, typer.Argument(help="Compressed folder.")]
Runnable = Annotated[
    str, typer.Argument(help="Compressed folder, or an original that fits in memory.")
]
Scores = Annotated[
    Path | None, typer.Option(help="Scores that the plan was made from, if not in the folder.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: one per core.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed folder or original model.")],
    text: Annotated[
        list[str],
        typer.Option(help="Text to predict: what --calib of compress takes, but self. Repeatable."),
    ],
    against: Annotated[str | None, typer.Option(help="Original model to compare with.")] = None,
    length: Annotated[
        int, typer.Option(help="Tokens per window, special ones that texts begin with included.")
    ] = 256,
    limit: Annotated[int | None, typer.Option(help="Windows per text; default: all.")] = None,
    device: DeviceToRun = None,
    activation_bits: ActivationBits = 8,
    generations: Annotated[
        int, typer.Option(help="Texts to continue, to count how often the model loops; 0: none.")
    ] = 16,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second and memory.")] = True,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Zero-shot tasks of lm-eval (pip extra: eval), such as piqa,gsm8k, or paper: the "
            "eight of arXiv:2410.06270. Repeatable."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your own task definitions (.yaml).")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Examples per task; default: all.")] = None,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Allow tasks to execute code that the model generates."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the result to this JSON file, for `moepress report`."),
    ] = None,
    prune: Prune = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, KL divergence from the original, loops, speed, memory and tasks.

    Example: moepress evaluate mixtral-2.5bit --against Mixtral-8x7B-v0.1 --text wiki.txt
    """
    from moepress.cli.tables import evaluation_table
    from moepress.evaluate import evaluate as run
    from moepress.writing.files import check_file

    if out is not None:
        check_file(out, "an evaluation")
    result = run(
        model,
        text,
        against=against,
        length=length,
        limit=limit,
        device=device_to_run(device, model, memory, gpu_memory),
        activation_bits=activation_bits,
        generations=generations,
        speed=speed,
        tasks=tasks or (),
        include_path=include_path,
        task_limit=task_limit,
        run_code=run_code,
        pruning=pruning(prune),
        memory=memory_size(memory),
        gpu_memory=gpu_memory_size(gpu_memory),
        trust_remote_code=trust_remote_code,
    )
    try:
        if out is not None:
            result.save(out)
    finally:  # it may have taken hours: shown even where the file cannot be written
        show(result.to_dict(), as_json, evaluation_table)


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Compressed folder, original model, or a file of scores, plan or calibration."
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare every byte of a compressed folder's tensors with checksums."
        ),
    ] = False,
    gpu_memory: GpuMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Describe a file or folder.

    Example: moepress inspect mixtral-2.5bit --json
    """
    from moepress.cli.tables import nested_table
    from moepress.inspect import inspect as run

    found = run(
        path,
        verify=verify,
        gpu_memory=gpu_memory_size(gpu_memory),
        trust_remote_code=trust_remote_code,
    )
    show(found, as_json, nested_table)


def prune(
    model: Annotated[Path, typer.Argument(help="Compressed folder, changed in place.")],
    strength: Annotated[
        str,
        typer.Argument(
            help="Share of the chosen experts to drop (0.15), paper, a .json file, or 0 for none. "
            "disk:0.15 depends on the machine: give it to the commands that run the model."
        ),
    ],
    protect: Annotated[
        float | None,
        typer.Option(help="Share of a prompt's tokens that keep all experts; default: 0.02."),
    ] = None,
) -> None:
    """Make a compressed folder drop experts whenever it is run, by any program.

    Example: moepress prune mixtral-2.5bit 0.15
    """
    from moepress.prune import parse_strength, set_pruning

    set_pruning(model, parse_strength(strength), protect)
    typer.echo(model)


def dequantize(
    model: Folder,
    out: Annotated[Path, typer.Argument(help="Folder to make, new or empty, or to continue.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the model with plain weights, as large as the original, for tools without moepress.

    Run again to continue a stopped run.

    Example: moepress dequantize mixtral-2.5bit mixtral-plain
    """
    from moepress.dequantize import dequantize as run

    typer.echo(run(model, out, trust_remote_code=trust_remote_code))


def generate(
    model: Runnable,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[
        int, typer.Option(help="Most new tokens; never more than the model reads.")
    ] = 64,
    device: DeviceToRun = None,
    activation_bits: ActivationBits = 8,
    prune: Prune = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a text, greedily.

    Example: moepress generate mixtral-2.5bit "Once upon a time" --tokens 100
    """
    lengthen_spin()
    from moepress.generate import generate as run

    text = run(
        model,
        prompt,
        tokens=tokens,
        device=device_to_run(device, model, memory, gpu_memory),
        activation_bits=activation_bits,
        pruning=pruning(prune),
        memory=memory_size(memory),
        gpu_memory=gpu_memory_size(gpu_memory),
        trust_remote_code=trust_remote_code,
    )
    typer.echo(text)


def chat(
    folder: Runnable,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue what is typed; for models not trained to chat.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0: greedy; default: the model's generation settings.")
    ] = None,
    threads: Threads = None,
    device: DeviceToRun = None,
    activation_bits: ActivationBits = 8,
    prune: Prune = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model in the terminal; /reset forgets, /exit ends, Ctrl-C stops an answer.

    Example: moepress chat mixtral-2.5bit --temperature 0.7
    """
    lengthen_spin()
    from moepress.chat import chat as run

    run(
        folder,
        system=system,
        raw=raw,
        tokens=tokens,
        temperature=temperature,
        threads=threads,
        device=device_to_run(device, folder, memory, gpu_memory),
        activation_bits=activation_bits,
        pruning=pruning(prune),
        memory=memory_size(memory),
        gpu_memory=gpu_memory_size(gpu_memory),
        trust_remote_code=trust_remote_code,
    )


def serve(
    folder: Annotated[
        str,
        typer.Argument(
            help="Compressed folder, or an original that fits in memory; also the model's name in "
            "requests."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all networks.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    threads: Threads = None,
    device: DeviceToRun = None,
    activation_bits: ActivationBits = 8,
    prune: Prune = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens of an answer.")] = 4096,
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of prompt and answer; default: what the model reads."),
    ] = None,
    concurrent: Annotated[int, typer.Option(help="Answers computed at the same time.")] = 128,
    queue: Annotated[
        int, typer.Option(help="Requests that wait beside them; one more gets 429.")
    ] = 128,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600,
    max_body: Annotated[
        float | None, typer.Option(help="Most MB of a request; default: by the context.")
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(
            help="Most GB of keys and values; default: half of what the weights leave free."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MOEPRESS_API_KEY", help="Key that clients must send; default: none."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name by which clients reach this server (Host header). Repeatable."),
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="Describe the endpoints at /docs.")] = False,
    reuse: Annotated[
        bool,
        typer.Option(help="Begin prompts with what earlier texts have in common with them."),
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model to any OpenAI client, many requests at a time (pip extra: serve).

    Example: moepress serve mixtral-2.5bit --port 8000
    """
    from moepress.serve import Limits
    from moepress.serve import serve as run

    limits = Limits(
        max_tokens=max_tokens,
        context=context,
        concurrent=concurrent,
        queue=queue,
        deadline=deadline,
        body=_in_bytes("--max-body", max_body, 1e6),
        cache=_in_bytes("--cache", cache, 1e9),
    )
    run(
        folder,
        host=host,
        port=port,
        threads=threads,
        device=device_to_run(device, folder, memory, gpu_memory),
        activation_bits=activation_bits,
        pruning=pruning(prune),
        memory=memory_size(memory),
        gpu_memory=gpu_memory_size(gpu_memory),
        trust_remote_code=trust_remote_code,
        limits=limits,
        api_key=api_key,
        allowed_hosts=allowed_host or (),
        docs=docs,
        reuse=reuse,
    )


def _in_bytes(option: str, size: float | None, unit: float) -> int | None:
    """The value of an option in bytes; None: not given.

    Raises:
        InputError: it is infinite or NaN.
    """
    from moepress.errors import InputError

    if size is not None and not isfinite(size):
        raise InputError(f"{option} is {size}. Expected a finite number.")
    return None if size is None else int(size * unit)


def report(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; default: moepress_report.html in the folder."),
    ] = None,
    scores: Scores = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="File of `moepress evaluate --out`, if not in the folder."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a page that shows what compression did to the model. Open it in any browser.

    Example: moepress report mixtral-2.5bit
    """
    from moepress.report import report as run

    made = run(
        folder,
        out,
        scores=scores,
        evaluation=evaluation,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(made)


def plot(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    form: Annotated[str, typer.Option("--format", help="svg or png.")] = "svg",
    scores: Scores = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the report's pictures as files.

    Example: moepress plot mixtral-2.5bit pictures/ --format png
    """
    from moepress.report import plot as run

    for path in run(folder, out, form=form, scores=scores, trust_remote_code=trust_remote_code):
        typer.echo(path)
