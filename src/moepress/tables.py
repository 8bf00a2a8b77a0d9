"""Results as text for people: what `--json` prints for programs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

WIDTH = 100


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain table: the first column to the left, numbers to the right."""
    drawn = Table(box=SIMPLE, pad_edge=False)
    for number, name in enumerate(columns):
        drawn.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(_cell, row))
    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH).print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


def evaluation_table(result: Mapping[str, Any]) -> str:
    """What `moepress evaluate` prints."""
    compared = result["original"] is not None
    columns = ["text", "tokens", "perplexity"]
    if compared:
        columns += ["original", "KL (nats)", "KL 99 %", "changed top"]
    keys = ["text", "tokens", "perplexity"]
    if compared:
        keys += ["original_perplexity", "kl", "kl_p99", "changed_top"]
    head = f"{result['model']}: {result['folder_bytes']:,} bytes"
    if compared:
        head += f", perplexity x {result['ratio']:.4f}, mean KL {result['kl']:.4f}"
    if result["pruning"] is not None:
        head += f", {result['pruning']['share']:.1%} of the chosen experts skipped"
    return head + "\n" + table(columns, ([text[key] for key in keys] for text in result["texts"]))


def nested_table(result: Mapping[str, Any]) -> str:
    """A dict of dicts, one line for each value."""
    return table(("", ""), _lines(result, ""))


def demo_table(result: Mapping[str, Any]) -> str:
    """What `moepress demo` prints."""
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
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
