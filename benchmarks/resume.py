"""Kill a compression at random moments until it is done; compare its bytes with a quiet run.

    python benchmarks/resume.py MODEL --calib TEXT [--kills 10] [--seed 0]

Each attempt is a process of its own, killed (SIGKILL) after a random share of the time that the
quiet run took. When a run finishes, its folder is compared with the quiet run's and deleted, and
the next run begins, until all kills are used. Ends with an error if any byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(given: argparse.Namespace, out: Path) -> list[str]:
    options = ["--bits", "2.5", "--calib", given.calib, "--sequences", "40"]
    return [sys.executable, "-m", "moepress", "-q", "compress", given.model, str(out), *options]


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        quiet, killed = Path(folder) / "quiet", Path(folder) / "killed"
        started = time.monotonic()
        subprocess.run(command(given, quiet), check=True, stdout=subprocess.DEVNULL)
        whole = time.monotonic() - started
        kills = runs = 0
        while kills < given.kills:
            process = subprocess.Popen(command(given, killed), stdout=subprocess.DEVNULL)
            try:
                process.wait(timeout=rng.uniform(0.2, 0.8) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                done = sorted(p.name for p in killed.rglob("*layer*")) if killed.exists() else []
                print(f"kill {kills}: on disk {', '.join(done) or 'nothing'}", flush=True)
                continue
            same = digests(quiet) == digests(killed)
            runs += 1
            print(f"run {runs} complete, same bytes: {same}", flush=True)
            if not same:
                sys.exit(1)
            shutil.rmtree(killed)
        subprocess.run(command(given, killed), check=True, stdout=subprocess.DEVNULL)
        same = digests(quiet) == digests(killed)
        print(f"killed {kills} times in {runs + 1} runs of {whole:.0f} s, same bytes: {same}")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
