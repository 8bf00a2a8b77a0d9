"""Results as text for people. Programs use `--json`."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from shutil import get_terminal_size
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moepress.byte_units import size_text
from moepress.errors import printable
from moepress.estimate import duration
from moepress.evaluation.tables import evaluation_tables

MOST_ROWS = 40  # of a list inside a description
LEAST = 0.01  # numbers below it are shown with three digits: costs and KL may be small
# Numbers from these on are shown with one decimal, and with none: speeds and bytes may be large.
LARGE, LARGEST = 1e3, 1e5


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a table: drawn if stdout is a terminal, else plain text whose lines never wrap.

    The first column is left-aligned, the others right-aligned.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: `>&-` closes it
    return _drawn(columns, cells) if on_terminal else _plain(columns, cells)


def _drawn(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    headed = any(columns)
    drawn = Table(box=SIMPLE_HEAD if headed else None, pad_edge=False, show_header=headed)
    for number, name in enumerate(columns):
        drawn.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    buffer = io.StringIO()
    width = get_terminal_size().columns
    console = Console(file=buffer, width=width, force_terminal=True, markup=False, emoji=False)
    console.print(drawn)  # cells are names from files: brackets in them are no markup
    return buffer.getvalue().strip("\n")


def _plain(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), *map(list, cells)] if any(columns) else [*map(list, cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Format the result of `moepress evaluate`."""
    head = f"{printable(result['model'])}: {result['folder_bytes']:,} bytes"
    if result["original"] is not None:
        head += f", perplexity x {result['ratio']:.4f}, mean KL {result['kl']:.4f}"
    if result["pruning"] is not None:
        head += f", {result['pruning']['share']:.1%} of the chosen experts dropped"
    return "\n\n".join([head, *(table(*drawn) for drawn in evaluation_tables(result))])


def proposal_table(result: Mapping[str, Any]) -> str:
    """Format the result of `moepress compress` without a budget."""
    memory, share = result["memory_bytes"], result["share_of_memory"]
    budgets = result["budgets"]
    least = budgets[-1]["predicted_loss"]
    rows = [
        [
            f"{math.ceil(round(row['bits'] * 100, 6)) / 100:.2f}",  # up: the smallest is possible
            row["bits_per_weight"],
            row["folder_bytes"],
            row["predicted_loss"],
            row["predicted_loss"] / least if least else None,
            *("yes" if row["folder_bytes"] <= share * size else "no" for size in memory.values()),
        ]
        for row in budgets
    ]
    head = ["--bits", "bits/weight", "bytes", "predicted loss", "times the least"]
    head += [f"fits {name} ({size_text(size)})" for name, size in memory.items()]
    lines = [
        table(head, rows),
        f"Fits: the model takes at most {share:.0%} of the memory; the rest is for the context.",
    ]
    for name, best in result["best_that_fits"].items():
        if best is None:
            lines.append(f"{name}: not even the smallest fits. Offer smaller --expert-bits.")
        else:
            lines.append(
                f"{name}: the best that fits is --bits {_exact(best['budget'])}, "
                f"{best['folder_bytes']:,} bytes. Add it to the same command."
            )
    return "\n".join([lines[0], "", *lines[1:]])


def _exact(number: float) -> str:
    """A number with as many digits as it takes: the smallest budget must not be rounded down."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def estimate_table(result: Mapping[str, Any]) -> str:
    """Format the result of `moepress compress --dry-run`."""
    rows = [
        [
            row["name"],
            duration(row["seconds"]),
            size_text(row["memory_bytes"]),
            size_text(row["disk_bytes"]),
        ]
        for row in [*result["stages"], {"name": "all", **result}]
    ]
    scored = result["scored_tokens"]
    measured = f", costs measured on {scored:,}" if scored < result["tokens"] else ""
    lines = [
        table(("stage", "time", "peak memory", "peak disk"), rows),
        "",
        f"{result['tokens']:,} calibration tokens{measured}, {result['threads']} threads, "
        f"device {result['device']}. Free: {size_text(result['free_memory_bytes'])} of memory, "
        f"{size_text(result['free_disk_bytes'])} of disk.",
    ]
    if result["folder_bytes"] is not None:
        lines.append(f"The compressed model takes about {size_text(result['folder_bytes'])}.")
    if not any(row["left"] for row in result["stages"]):
        lines.append("Nothing is left to do: an earlier run has finished all of it.")
    elif done := [row["name"] for row in result["stages"] if row["left"] < 1]:
        lines.append(f"An earlier run has finished part of: {', '.join(done)}.")
    if result["memory_bytes"] > result["free_memory_bytes"]:
        lines.append("This needs more memory than is free.")
    if result["reading"]:
        lines.append(result["reading"])
    return "\n".join(lines)


def nested_table(result: Mapping[str, Any]) -> str:
    """Format nested dicts, one line per value; lists of dicts and of lists as tables below."""
    rows: list[tuple[str, Any]] = []
    below = []
    for name, value in _lines(result, ""):
        if value and isinstance(value, list) and isinstance(value[0], dict | list):
            rows.append((name, f"{len(value):,}, below"))
            below.append((name, value))
        else:
            rows.append((name, value))
    return "\n\n".join([table(("", ""), rows), *(_listed(name, value) for name, value in below)])


def _listed(name: str, value: Sequence[Any]) -> str:
    """A list of equal dicts or of lists as a table under its name; long ones are cut."""
    shown = value[:MOST_ROWS]
    if isinstance(value[0], dict):
        head, rows = list(value[0]), [list(row.values()) for row in shown]
    else:
        head = ["", *(str(number) for number in range(1, max(map(len, shown)) + 1))]
        rows = [[str(number), *row] for number, row in enumerate(shown)]
    rows = [[*row, *[None] * (len(head) - len(row))] for row in rows]
    cut = len(value) - len(shown)
    more = f"\n... and {cut:,} more: --json has all" if cut else ""
    return f"{name}\n{table(head, rows)}{more}"


def demo_table(result: Mapping[str, Any]) -> str:
    """Format the result of `moepress demo`."""
    keys = ("folder_bytes", "bits_per_weight", "expert_bits_per_weight", "perplexity", "kl")
    rows = [[row["name"], *(row[key] for key in keys)] for row in result["models"]]
    head = ("model", "bytes", "bits/weight", "expert bits/weight", "perplexity", "KL (nats)")
    samples = "\n".join(
        f"\n{row['name']} continues {result['prompt']!r}:\n{row['sample']}"
        for row in result["models"]
    )
    return table(head, rows) + "\n" + samples + f"\n\n{result['seconds']:.0f} seconds in all"


def _lines(value: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from _lines(item, f"{name}.")
        else:
            yield name, item


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < LEAST and value:
        return f"{value:.3g}"
    decimals = 4 if abs(value) < LARGE else 1 if abs(value) < LARGEST else 0
    return f"{value:,.{decimals}f}"
