"""Command lines with one hostile value, and what becomes of a command.

`variants(good, rng)` yields (name, words) without end; `outcome(words)` runs them in this process.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Iterator, Mapping, Sequence

import typer.main

from moepress import cli
from tests.damage import ending

VALUES = (
    "", " ", "0", "-0", "-1", "1", "1.5", "2", "nan", "inf", "-inf", "1e999", "1e-320", "1e18",
    "1000000000000", "9" * 400, "9" * 5000, "0x10", "1_000", "\u0663", " 2 ", "2\n", "1,2", "1,,2",
    ",", "1,nan", "0,1", "1,2,2.5,99", "true", "None", "x", "caf\u00e9", "\U0001f999", "\udcff",
    "\x1b[2J", "-", "=", "=1", "x=nan", "x=-1", "x=1e999", "self", "self=0", "stdlib=1e308", ".",
    "..", "/", "~", "nothing", "nothing/at/all", "/dev/null", "/dev/zero", "/dev/full",
    "/proc/self/mem", "/proc/1/nothing", "a/" * 3000, "y" * 300, "12GB", "-1GB", "nanGB", "1e9TB",
    "0GB", "all", "mapped", "cuda", "cuda:99", "cpu:0", "meta", "disk:nan", "disk:2", "paper",
    "owner/name", "owner/name/more", "https://example.org/x",
)  # fmt: skip


def variants(
    good: Mapping[str, Sequence[str]], rng: random.Random
) -> Iterator[tuple[str, list[str]]]:
    """Good command lines in which one argument is another, or one option is added.

    Args:
        good: by name of the command, its arguments.
    """
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    number = 0
    while True:
        name = rng.choice(sorted(good))
        words, value = list(good[name]), rng.choice(VALUES)
        options = [
            option.opts[0]
            for option in commands[name].params
            if option.param_type_name == "option" and not option.is_flag
        ]
        if not options or rng.random() < 0.3:
            place = rng.randrange(len(words))
            words[place] = value
            what = f"argument {place}"
        else:
            what = rng.choice(options)
            words += [what, value]
        yield f"{number:05d} {name}: {what} = {value[:30]!r}", [name, *words]
        number += 1


def outcome(words: Sequence[str], typed: str = "", longest: int = ending.LONGEST) -> str:
    """How a command ends: "done", "refused: ...", or "WRONG: ..."."""
    out, err = io.StringIO(), io.StringIO()

    def run() -> str:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv = ["moepress", "-q", *words]
            try:
                cli.main()
            except SystemExit as stop:
                return str(stop.code or 0)
        return "0"

    before = sys.argv, sys.stdin
    sys.stdin = io.StringIO(typed)
    try:
        code = ending.outcome(run, longest)
    finally:
        sys.argv, sys.stdin = before
    return code if code.startswith("WRONG") else _judged(code, err.getvalue())


def _judged(code: str, err: str) -> str:
    told = [line for line in err.splitlines() if line.startswith("moepress: ")]
    if "TooLongError" in err:
        return "WRONG: hangs"
    if "Traceback" in err or "defect of moepress" in err:
        return f"WRONG: {err[-700:]}"
    if code == "0":
        return "WRONG: an error, and exit code 0" if told else "done"
    if code in ("1", "2") and len(told) == 1 and len(told[0]) < ending.LINE:
        return f"refused: {code}: {told[0]}"
    if code == "2" and "Usage:" in err:  # of the parser of the command line
        return "refused: 2: usage"
    return f"WRONG: exit code {code}: {err[-700:]}"
