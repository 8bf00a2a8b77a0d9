"""An evaluation as the rows of tables, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def evaluation_tables(result: Mapping[str, Any]) -> list[tuple[Sequence[str], list[list[Any]]]]:
    """(column names, rows) of each table of an evaluation; bytes by part come last."""
    columns = {"text": "text", "tokens": "tokens", "perplexity": "perplexity"}
    if result["original"] is not None:
        columns |= {
            "original_perplexity": "original",
            "kl": "KL (nats)",
            "kl_p99": "KL 99 %",
            "changed_top": "changed top",
        }
    rows = [[text[key] for key in columns] for text in result["texts"]]
    tables: list[tuple[Sequence[str], list[list[Any]]]] = [(tuple(columns.values()), rows)]
    if result["tasks"]:
        rows = [
            [task, metric.removesuffix(",none"), value, metrics.get(_error_of(metric))]
            for task, metrics in result["tasks"].items()
            for metric, value in metrics.items()
            if "_stderr" not in metric
        ]
        tables.append((("task", "metric", "value", "standard error"), rows))
    loops = [
        [name, found["looping"], found["generations"]]
        for name, key in (("this model", "repetition"), ("original", "original_repetition"))
        if (found := result[key]) is not None
    ]
    if loops:
        tables.append((("greedy generations", "ending in a loop", "of"), loops))
    if (speed := result["performance"]) is not None:
        rows = [
            [f"prefill, tokens/s ({speed['prefill_tokens']} tokens)",
             speed["prefill_tokens_per_second"]],
            [f"decode, tokens/s ({speed['decode_tokens']} tokens)",
             speed["decode_tokens_per_second"]],
            ["peak memory, bytes", speed["peak_bytes"]],
            ["threads", speed["threads"]],
        ]  # fmt: skip
        tables.append(((f"on {speed['device']}", ""), rows))
    sizes = [[part, size["original"], size["stored"]] for part, size in result["parts"].items()]
    tables.append((("part", "original bytes", "stored bytes"), sizes))
    return tables


def _error_of(metric: str) -> str:
    """lm-eval's name for the standard error of a metric."""
    name, _, kind = metric.partition(",")
    return f"{name}_stderr,{kind}"
