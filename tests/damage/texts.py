"""Damaged calibration texts, without end, from a seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

SUFFIXES = ("txt", "md", "py", "json", "jsonl", "JSONL", "ndjson", "")
VALUES = (
    *("null", "true", "3", "1.5", "NaN", "1e400", "9" * 5000, "[" * 10_000, "[]", "{}", '""'),
    *('"\\ud800"', '"\\u0000"', '"caf\\u00e9"', '[{"role": "user"}]', '[{"role": 3}]', "[3]"),
)
ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig")


def variants(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """File names, all different, and contents: prose or records, most of them damaged."""
    number = 0
    while True:
        lines = [f"line {i} of a café, {rng.random()}" for i in range(rng.choice((0, 1, 30, 300)))]
        records = [{rng.choice(("text", "text", "text", "body", "messages")): x} for x in lines]
        content = rng.choice(
            (
                "\n".join(lines),
                "\r\n".join(lines),
                "\n".join(map(json.dumps, records)),
                "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records),
                json.dumps(records, indent=rng.choice((None, 2))),
                json.dumps({"data": records}),
            )
        )
        if rng.random() < 0.3:
            content = content.replace('"line ', f'{rng.choice(VALUES)}, "line ', 1)
        if rng.random() < 0.3:
            content = content.replace(': "line', f': {rng.choice(VALUES)}, "x": "line', 2)
        raw = content.encode(rng.choice(("utf-8", "utf-8", *ENCODINGS)))
        yield f"{number:04d}.{rng.choice(SUFFIXES)}", _damaged(raw, rng)
        number += 1


def _damaged(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, or none."""
    at = rng.randrange(len(raw) + 1)
    how = rng.randrange(6)
    if how == 0:
        return raw[:at]
    if how == 1:
        return raw[:at] + rng.randbytes(3) + raw[at:]
    if how == 2:
        return raw[:at] + b"\0" + raw[at + 1 :]
    return raw
