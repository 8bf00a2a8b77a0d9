"""Results as text: one line for each as it comes, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from on_gpu.case import Row

UNTABLED = ("checks", "compile")  # parts whose figures are in the lines alone


def short(row: Row) -> str:
    """One line of a result: everything if it failed, the figures otherwise."""
    head = f"{row['part']}: {row['case']}"
    if "took" in row:
        head += f" ({row['took']:.1f} s)"
    if not row["ok"]:
        trace = "".join(f"\n    {line}" for line in row.get("trace", []))
        return f"{head} FAILED {row['error']}{trace}"
    shown = [", ".join(f"{k} {figure(v)}" for k, v in r.items()) for r in row.get("rows") or []]
    return f"{head} ok" + ("" if not shown else ": " + "; ".join(shown))[:900]


def figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def table(
    results: Sequence[Row], seconds: float, parts: Sequence[str], checked: Sequence[str]
) -> str:
    """Counts of checks, what failed, and all measured figures.

    Args:
        results: of all cases.
        seconds: that the run took.
        parts: in the order of the table.
        checked: parts whose cases count as checks.
    """
    checks = [r for r in results if r["part"] in checked]
    good = sum(r["ok"] for r in checks)
    failed = [f"{r['part']}: {r['case']}: {r['error'][:300]}" for r in results if not r["ok"]]
    lines = [f"checks passed: {good} of {len(checks)}; {seconds:.0f} s in all"]
    lines += [f"FAILED {text}" for text in failed]
    for part in parts:
        rows = [
            {"case": r["case"], **row}
            for r in results
            if r["part"] == part and r["ok"] and part not in UNTABLED
            for row in r.get("rows") or []
        ]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row), []).append(row)
        for names, members in groups.items():
            lines += ["", f"{part} | " + " | ".join(names)]
            lines += [" | ".join(figure(row[name]) for name in names) for row in members]
    return "\n".join(lines)
