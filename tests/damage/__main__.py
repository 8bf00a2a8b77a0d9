"""The longer run: thousands of variants, and a table of what became of them, by reader.

    python -m tests.damage [--variants 500] [--seed 7] [--batch 100] [--only READER]

Each batch is a process of its own with a seed of its own, so that a crash is seen and ends only its
batch. Prints Markdown, then every outcome that is wrong with the seed of its batch; ends with 1 if
there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SILENCE = 300  # seconds without a line after which a batch hangs, beyond the limit of a variant
TESTS = {
    "originals": ("test_sources.py", "harmless"),
    "originals, compressed": ("test_sources.py", "compressing"),
    "compressed folders": ("test_ours.py", "folders"),
    "unfinished work": ("test_stopped.py", ""),
    "documents": ("test_ours.py", "documents"),
    "texts": ("test_texts.py", ""),
    "files beside the weights": ("test_commands.py", "companions"),
    "words of the command line": ("test_commands.py", "words"),
    "requests to the server": ("../serve/test_damaged_requests.py", ""),
}
# Column, and how an outcome of it begins; the first that fits counts.
COLUMNS = (
    ("refused in one line", ("refused",)),
    ("harmless", ("same", "taken", "done", "read")),
    ("found by `--verify`", ("told",)),
    ("crash", ("WRONG: crash",)),
    ("hang", ("WRONG: hangs",)),
    ("half-written", ("WRONG: left behind",)),
    ("another model, unseen", ("WRONG: another", "WRONG: other", "WRONG: not read")),
    ("traceback, or not one line", ("WRONG",)),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one variant."""

    reader: str
    seed: int
    name: str
    told: str


def batch(reader: str, seed: int, count: int) -> list[Outcome]:
    """Outcomes of `count` variants for each test of a reader, from a process of its own."""
    file, words = TESTS[reader]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "outcomes"
        path.touch()
        told = {"MOEPRESS_OUTCOMES": str(path), "MOEPRESS_SEED": str(seed)}
        command = [sys.executable, "-m", "pytest", "-n", "0", f"--basetemp={work}/files"]
        command += [str(Path(__file__).parent / file), *(["-k", words] if words else [])]
        with (Path(work) / "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **told, "MOEPRESS_VARIANTS": str(count)},
                stdout=log,
                stderr=log,
            )
            end = _ended(process, path)
            log.seek(0)
            found = list(_read(path, reader, seed, end))
            if not found or (process.returncode not in (0, 1)):
                print(log.read()[-3000:], file=sys.stderr)
    return found


def _ended(process: subprocess.Popen[bytes], path: Path) -> str:
    """Wait for a process; how a variant without an outcome ended."""
    size, silent = 0, 0
    while process.poll() is None:
        time.sleep(1)
        silent = silent + 1 if path.stat().st_size == size else 0
        size = path.stat().st_size
        if silent > SILENCE and size:
            process.kill()
            process.wait()
            return "WRONG: hangs beyond all limits"
    return f"WRONG: crash: exit code {process.returncode}"


def _read(path: Path, reader: str, seed: int, end: str) -> Iterator[Outcome]:
    last: dict[tuple[str, str], str | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        test, name, told = json.loads(line)
        last[test, name] = told
    for (test, name), told in last.items():
        row = test.partition("[")[2].rstrip("]") if reader == "documents" else reader
        yield Outcome(row, seed, name, end if told is None else told)


def column(told: str) -> str:
    """The column of the table that an outcome belongs to."""
    return next(name for name, starts in COLUMNS if told.startswith(starts))


def table(found: list[Outcome]) -> str:
    """Outcomes by reader, in Markdown."""
    names = [name for name, _ in COLUMNS]
    lines = [f"| reader | variants | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for reader in [*dict.fromkeys(one.reader for one in found), "all"]:
        counts = Counter(column(one.told) for one in found if reader in (one.reader, "all"))
        cells = " | ".join(str(counts[name]) for name in names)
        lines.append(f"| {reader} | {counts.total()} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=500, help="of each reader")
    parser.add_argument("--batch", type=int, default=100, help="variants of a process")
    parser.add_argument("--seed", type=int, default=7, help="of the first batch")
    parser.add_argument("--only", choices=TESTS, action="append")
    given = parser.parse_args()
    found: list[Outcome] = []
    for reader in given.only or TESTS:
        for number in range(0, given.variants, given.batch):
            count = min(given.batch, given.variants - number)
            found += batch(reader, given.seed + number // given.batch, count)
            print(f"{reader}: {len(found)} variants so far", file=sys.stderr, flush=True)
    print(table(found))
    wrong = [one for one in found if one.told.startswith("WRONG")]
    for one in wrong:
        print(f"seed {one.seed}, {one.reader}: {one.name}: {one.told}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
