"""Stop a compression at random moments, or fill its disk, until it is done; compare its bytes.

    python benchmarks/resume.py kill [MODEL] [--recipe fast] [--stops 100] [--seed 0]
    python benchmarks/resume.py term [MODEL] [--recipe fast] [--stops 20]
    python benchmarks/resume.py full [MODEL] [--recipe default]     # as root: it mounts a tmpfs

An undisturbed run comes first; every disturbed one must end with the same bytes. Attempts are
forked from a process that has imported everything: importing would take most of their time, and
most stops would hit it. `kill` and `term` stop an attempt (SIGKILL, SIGTERM) after a random share
of the time that the undisturbed run took; when a run finishes, its folder is compared and deleted,
and the next one begins. `full` runs in a tmpfs that has room for a little more in each attempt,
with the check for free space blinded, so that each stage meets the error of the disk itself. Ends
with an error if any byte differs, or an attempt ends otherwise than it should.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import moepress
from moepress import cli
from moepress.demo import MODEL

PAGE = 4096
STEPS = 24  # sizes of the disk


def words_of(given: argparse.Namespace, out: Path) -> list[str]:
    """The command of every attempt."""
    options = ["--bits", "2.5", "--calib", given.calib, "--recipe", given.recipe]
    sizes = ["--sequences", str(given.sequences), "--sequence-length", "128"]
    return ["moepress", "-q", "compress", str(given.model), str(out), *options, *sizes]


def forked(words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start a command in a forked process, with its output in `log`; return its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        before()
        sys.argv = words
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def waited(process: int, seconds: float | None = None) -> int | None:
    """Exit code of a process, negative for a signal; None: it still runs after some seconds."""
    until = None if seconds is None else time.monotonic() + seconds
    while until is None or time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stage_of(out: Path) -> str:
    """What an attempt was at, from the files that it left."""
    work = out / ".moepress"
    if not (work / "text.safetensors").is_file():
        return "text" if work.is_dir() or not out.exists() else "end"
    if (out / "model.safetensors.index.json").is_file():
        return "end"
    if (work / "quantize").is_dir():
        return "quantize"
    if (out / "moepress_scores.safetensors").is_file():
        return "allocate"
    found = [path.name for path in work.rglob("*")]
    if any(name.startswith("layer-") for name in found):
        return "score"
    if any(name.startswith(("gradient-", "sensitivity-0")) for name in found):
        return "backward walk"
    return "forward walk" if "sensitivity" in found else "score"


def check(good: bool, text: str, log: Path) -> None:
    if not good:
        sys.exit(f"{text}\n{log.read_text(encoding='utf-8')}")


def line_of(log: Path) -> str:
    """The line in which an attempt told its end."""
    lines = log.read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line.startswith("moepress: ")]
    check(len(told) == 1 and "Traceback" not in "".join(lines), "not one line", log)
    return told[0]


def stops(given: argparse.Namespace, folder: Path, right: dict[str, str], whole: float) -> None:
    """The modes `kill` and `term`."""
    rng = random.Random(given.seed)
    number = signal.SIGKILL if given.mode == "kill" else signal.SIGTERM
    out, log = folder / "stopped", folder / "log"
    stages: Counter[str] = Counter()
    runs = 0
    while stages.total() < given.stops or out.exists():
        process = forked(words_of(given, out), log)
        last = stages.total() >= given.stops
        code = waited(process, None if last else rng.uniform(0.05, 0.9) * whole)
        if code is None:
            os.kill(process, number)
            code = waited(process)
            if code != 0:
                expected = -number if given.mode == "kill" else 128 + number
                check(code == expected, f"exit code {code}, expected {expected}", log)
                if given.mode == "term":
                    check("stopped by SIGTERM" in line_of(log), "another message", log)
                stages[stage_of(out)] += 1
                continue
        check(code == 0, f"exit code {code}", log)
        check(digests(out) == right, "OTHER BYTES", log)
        runs += 1
        print(f"run {runs} complete after {stages.total()} stops, same bytes", flush=True)
        shutil.rmtree(out)
    where = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    print(
        f"{given.recipe}: {stages.total()} x {number.name} in {runs} runs of {whole:.1f} s, "
        f"same bytes each time ({where})"
    )


def full(given: argparse.Namespace, folder: Path, right: dict[str, str]) -> None:
    """The mode `full`."""
    disk, log = folder / "disk", folder / "log"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (folder / "right").rglob("*") if path.is_file())
    step = size // STEPS // PAGE * PAGE
    room = 8 * PAGE  # a tmpfs of 0 pages has no limit

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)], check=True)

    def blind() -> None:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)  # type: ignore

    mount("-o", f"size={room}")
    try:
        stages: dict[str, list[str]] = {}
        while (code := waited(forked(words_of(given, disk / "out"), log, blind))) != 0:
            text = line_of(log)
            check(code in (1, 2) and "No space left" in text, f"exit code {code}", log)
            left = [p.name for p in disk.rglob("*.moepress-partial")]
            check(not left, f"unfinished files {left}", log)
            stages.setdefault(stage_of(disk / "out"), []).append(text)
            room += step
            mount("-o", f"remount,size={room}")
        check(digests(disk / "out") == right, "OTHER BYTES", log)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    where = ", ".join(f"{stage} {len(texts)}" for stage, texts in stages.items())
    print(f"{given.recipe}: disk full {sum(map(len, stages.values()))} times, same bytes ({where})")
    for stage, texts in stages.items():
        print(f"  {stage}: {texts[0].replace(str(disk), 'DISK')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("kill", "term", "full"))
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    assert moepress.compress  # everything is imported before the first fork
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        right, log = folder / "right", folder / "log"
        started = time.monotonic()
        code = waited(forked(words_of(given, right), log))
        whole = time.monotonic() - started
        check(code == 0, f"exit code {code}", log)
        if given.mode == "full":
            full(given, folder, digests(right))
        else:
            stops(given, folder, digests(right), whole)


if __name__ == "__main__":
    main()
