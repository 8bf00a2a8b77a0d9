"""The command line: each command turns its arguments into one function call and prints the result.

making.py has the commands that make a compressed model, using.py those that use one, trying.py
`demo` and `doctor`. Results go to stdout, progress and warnings to stderr. Exit code 0: done,
1: the work failed, 2: the input was wrong. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from moepress.cli import making, trying, using

RESUMABLE = ("compress", "score", "quantize")  # commands that keep their unfinished work

app = typer.Typer(
    name="moepress",
    help="Compress Mixture-of-Experts language models to 1.5-3 bits per expert weight.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    making.compress,
    making.calibrate,
    making.score,
    making.allocate,
    making.quantize,
    trying.demo,
    trying.doctor,
    using.evaluate,
    using.inspect,
    using.prune,
    using.dequantize,
    using.generate,
    using.chat,
    using.serve,
    using.report,
    using.plot,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
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
    """Run the command line. Errors of moepress become one line on stderr and an exit code."""
    from moepress.errors import InputError, MoepressError

    # Threads that spin while they wait for each other make small operations many times slower as
    # soon as anything else runs on the machine; threads that sleep at once cost a tenth of the
    # decoding speed. A short spin, about ten microseconds, avoids both (docs/log.md#short-spin and
    # docs/log.md#passive-threads).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except MoepressError as error:
        typer.echo(f"moepress: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        advice = " Run the same command again to continue." if command in RESUMABLE else ""
        typer.echo(f"moepress: stopped.{advice}", err=True)
        sys.exit(1)
