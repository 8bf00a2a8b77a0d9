"""The command line: each command turns its arguments into one function call and prints the result.

making.py has the commands that make a compressed model, using.py those that use one, trying.py
`demo` and `doctor`; ending.py says how commands end. Results go to stdout, progress and warnings to
stderr. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer

from moepress.cli import making, trying, using
from moepress.cli.ending import ended, set_debug

DEBUG = "--debug"
QUIET = ("--quiet", "-q")

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
    app.command()(ended(command))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[
        bool, typer.Option(*QUIET, help="Show no progress. May stand anywhere.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error. May stand anywhere.")
    ] = False,
) -> None:
    from moepress import __version__

    if version:
        typer.echo(f"moepress {__version__}")
        raise typer.Exit
    set_debug(debug)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if quiet:
        from moepress.progress import set_verbosity

        set_verbosity("quiet")


def main() -> None:
    """Run the command line."""
    _in_utf8()
    app(_for_all_first(sys.argv[1:]))


def _in_utf8() -> None:
    """Take words and paths as UTF-8 under any locale; escape what a terminal cannot show.

    What is typed and cannot be read is replaced by U+FFFD.

    Python itself does so in the C locale, unless PYTHONUTF8=0. Words are then ASCII with what is
    not in it escaped, which libraries cannot open: start again, in UTF-8.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _for_all_first(words: list[str]) -> list[str]:
    """The words of a command, with `--debug` and `--quiet` before `--` moved to the front."""
    until = words.index("--") if "--" in words else len(words)
    return sorted(words[:until], key=lambda word: word not in (DEBUG, *QUIET)) + words[until:]
