"""Check and time the CUDA kernels on a real card: one command, table last.

    PYTHONPATH=src python3 benchmarks/gpu.py [--out FOLDER] [--only checks,ops] [--minutes 8]

Needs what moepress itself needs, and nothing of it that is compiled: the reference backend on the
CPU is the oracle. Weights are random and made on the card. Each part runs in processes of its own,
so that a kernel that fails or hangs costs one case and not the run. Results go to stdout and, as
lines of JSON, to FOLDER/gpu.jsonl; the table is in FOLDER/gpu.md too.

    checks     every op against the oracle; CUDA graphs
    attention  attention of decoded tokens beside transformers' and torch's; logits of a model
    small      norms, rotary embedding and cache of a token beside transformers'; logits of a model
    route      routers of few tokens beside torch's kernels; routers of transformers
    captured   captured steps of `generate`: failed captures, tokens per second with Mixtral-8x7B's
               shape, the tokens of tiny models (these need what moepress's tests need)
    ops        the MoE op of Mixtral-8x7B with few tokens, beside copy bandwidth; its kernels
    prefill    the MoE op with many tokens, beside torch's grouped bfloat16 product
    model      decoding with Mixtral-8x7B's shape at 2.5 bits, beside transformers in bfloat16
    divided    experts on the card and on the CPU: half of a layer, and of the models of `kl`
    kl         small compressed models beside the same on the CPU (folder made by on_gpu/kl.py)
    search     the trellis search
    shapes     the MoE op of other models with few tokens; the linear op
    compile    torch.compile of a packed block
    sanitize   compute-sanitizer on small runs of every kernel; a group: sanitize@trellis_decode
    families   tiny models of all families, compressed and run on the card and on the CPU (only when
               named; needs what moepress's tests need)
    compress   compression of two layers of Mixtral-8x7B's shape (only when named)

First all kernels are compiled, several at a time. Checks and families are divided over `--workers`
processes; what is timed runs alone.

`--device cpu --tiny` proves the script on a machine without a card, and with `--emulate` the
kernels too, in the emulator of tests/kernels/cuda.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from on_gpu import sanitizer
from on_gpu.case import BACKEND, Case, Row
from on_gpu.report import short, table

PARTS = {  # name: share of the time
    "checks": 0.3,
    "attention": 0.06,
    "small": 0.04,
    "route": 0.04,
    "captured": 0.25,  # before `model`, which has all later Mixtrals of its process compiled
    "divided": 0.06,
    "ops": 0.1,
    "prefill": 0.1,
    "model": 0.2,
    "kl": 0.08,
    "search": 0.06,
    "shapes": 0.15,
    "compile": 0.12,
    "sanitize": 0.3,
    "families": 0.5,
    "compress": 0.3,
}
OPTIONAL = ("families", "compress")  # run only when named
SHARED = ("checks", "families")  # their cases are divided over workers: nothing is timed
TABLED = ("start", *PARTS)
CHECKED = (
    "start", "checks", "attention", "route", "small", "captured", "divided", "kl", "search",
    "compile", "sanitize", "families",
)  # fmt: skip
EMULATED = 10  # times as long may a case take in the emulator
START = 150  # seconds for compiling all kernels, at most
RESTARTS = 12  # of a worker that died
START_SECONDS = 90  # to import torch and to reach the first case
CORES = len(os.sched_getaffinity(0))
EXIT_BROKEN = 3  # of a worker whose CUDA context is lost


# A worker runs the cases of all parts, one line of JSON for each.


def work(given: argparse.Namespace) -> None:
    """Run cases from number `first` on. A part whose time is over is left."""
    import torch

    from on_gpu.card import Card

    card = Card(given.device, given.tiny)
    torch.manual_seed(0)
    if given.emulate:
        emulate()
    number = -1
    for item in given.part.split(","):
        part, _, until = item.partition("@")
        for case in cases_of(part, until, card, given):
            number += 1
            if number < given.first or number % given.workers != given.turn:
                continue
            limit = case.seconds * (EMULATED if given.emulate else 1)
            say(event="start", number=number, part=part, case=case.name, seconds=limit)
            started = time.perf_counter()
            end: Row
            if until and part != "sanitized" and time.time() > float(until):
                end = {"ok": False, "error": "no time left"}
            else:
                end = result_of(case, card)
            say(event="end", took=time.perf_counter() - started, **end)
            card_is_lost(card)
            card.release()


def result_of(case: Case, card: Any) -> Row:
    try:
        rows = case.run()
        card.synchronize()
        return {"ok": True, "rows": rows}
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        name = type(error).__name__
        return {"ok": False, "error": f"{name}: {error}"[:4000], "trace": lines[-12:]}


def emulate() -> None:
    """Run the CUDA kernels on the CPU, in the emulator of tests/kernels/cuda."""
    import dataclasses

    from moepress import kernels
    from moepress.kernels.cuda import grouped, launch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.kernels.cuda import emulate as emulator

    launcher = launch.Launcher(emulator.launch, multiprocessors=8)
    launch.LAUNCHERS["cpu"] = lambda device: launcher
    grouped._new_enough = lambda device: True
    backend = kernels.BACKENDS["cuda"]
    kernels.register_backend(
        dataclasses.replace(
            backend, name="cpu", rank=99, device_types=("cpu",), refuses=lambda device: None
        )
    )


def card_is_lost(card: Any) -> None:
    """Leave the process if the CUDA context is lost: the parent starts another one."""
    try:
        card.synchronize()
    except Exception:
        sys.stdout.flush()
        os._exit(EXIT_BROKEN)


def cases_of(part: str, group: str, card: Any, given: argparse.Namespace) -> Iterator[Case]:
    from importlib import import_module

    homes = {"prefill": "ops", "shapes": "ops", "compress": "search"}
    if part == "sanitized":
        run = import_module("on_gpu.sanitized").run
        yield Case(group, lambda: run(card, group), 600)
    elif part in ("divided", "kl"):
        yield from import_module(f"on_gpu.{part}").cases(card, Path(given.models))
    elif part == "compile":
        yield from import_module("on_gpu.blocks").compile_cases(card)
        static = import_module("on_gpu.kl").check_static_generate
        yield Case("generate", lambda: static(card, Path(given.models)), 180)
    elif part in homes:
        yield from getattr(import_module(f"on_gpu.{homes[part]}"), f"{part}_cases")(card)
    else:
        yield from import_module(f"on_gpu.{part}").cases(card)


def say(**line: Any) -> None:
    print("\x1e" + json.dumps(line), flush=True)  # anything else on stdout is a library's


# The parent starts workers, and kills those that hang.


class Run:
    """All results so far, and the time that is left."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.started = time.monotonic()
        self.deadline = self.started + 60 * given.minutes
        self.results: list[Row] = []
        self.lock = threading.Lock()
        self.file = None
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            self.file = (given.out / "gpu.jsonl").open("a")

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, **row: Any) -> None:
        with self.lock:
            self.results.append(row)
            if self.file is not None:
                print(json.dumps(row), file=self.file, flush=True)
            print(f"[{time.monotonic() - self.started:5.0f} s] {short(row)}", flush=True)

    def start(self) -> bool:
        """Compile all kernels: whether they run here."""
        self.parts(["start"], [min(self.deadline, time.monotonic() + START)])
        return any(row["case"] == BACKEND and row["ok"] for row in self.results)

    def shared(self, name: str, end: float) -> None:
        """Run the cases of one part in several workers, until an end."""
        workers = self.given.workers
        with ThreadPoolExecutor(workers) as pool:
            turns = [
                pool.submit(self.parts, [name], [end], turn, workers) for turn in range(workers)
            ]
        for turn in turns:
            turn.result()

    def parts(
        self, names: Sequence[str], ends: Sequence[float], turn: int = 0, workers: int = 1
    ) -> None:
        """Run the cases of parts, each until its end (monotonic seconds).

        Of several workers, each runs the cases whose numbers have the remainder `turn`.
        """
        first, offset = 0, time.time() - time.monotonic()
        passed = ",".join(f"{n}@{e + offset:.0f}" for n, e in zip(names, ends, strict=True))
        divided = ["--turn", str(turn), "--workers", str(workers)]
        threads = {"OMP_NUM_THREADS": str(max(1, CORES // workers)), "OMP_WAIT_POLICY": "passive"}
        setting = threads if names[0] in SHARED else {}
        for _ in range(RESTARTS):
            first, finished = self._worker(["--part", passed, *divided], setting, first, ends[-1])
            if finished or time.monotonic() > ends[-1]:
                return

    def _worker(
        self, work: Sequence[str], setting: dict[str, str], first: int, end: float
    ) -> tuple[int, bool]:
        """Run one worker: (the case to continue with, whether all are finished)."""
        command = [*self.command(), *work, "--first", str(first)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | setting,
        )
        lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        limit, noise = float(START_SECONDS), list[str]()
        running: Row | None = None
        now = {"part": "worker", "case": "start"}
        number = first - 1
        while True:
            wait = min(limit, end + 20 - time.monotonic())
            try:
                line = lines.get(timeout=max(wait, 0.1))
            except queue.Empty:
                process.kill()
                process.wait()
                over = time.monotonic() > end
                why = "the time is over" if over else f"no answer in {limit:.0f} s"
                self.keep(**now, ok=False, error=f"killed: {why}", trace=noise)
                return number + 1, over or number < first
            if line is None:
                break
            before, mark, told_text = line.partition(b"\x1e")
            if before.strip():
                noise = [*noise[-20:], before.decode(errors="replace").rstrip()]
            if not mark:
                continue
            told = json.loads(told_text)
            if told.pop("event") == "start":
                number, limit = told["number"], told["seconds"]
                running = now = {"part": told["part"], "case": told["case"]}
            else:
                self.keep(**now, **told)
                running, limit, noise = None, float(START_SECONDS), []
                if now["case"] == BACKEND and not told["ok"]:  # nothing else would be of use
                    process.kill()
                    return number + 1, True
        code = process.wait()
        if code == 0:
            return number + 1, True
        if running is not None or number < first:
            self.keep(**now, ok=False, error=f"process ended with {code}", trace=noise)
        return number + 1, number < first

    def command(self) -> list[str]:
        """A worker's command, without what it shall do."""
        given = self.given
        switches = [f"--{name}" for name in ("tiny", "emulate") if getattr(given, name)]
        where = ["--device", given.device, "--models", str(given.models)]
        return [sys.executable, __file__, *where, *switches]


def _read(process: subprocess.Popen[bytes], lines: queue.Queue[bytes | None]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def order(name: str) -> tuple[int, int]:
    """Shared parts first, then those that run alone, then the sanitizer.

    Raises:
        SystemExit: there is no such part.
    """
    if name not in PARTS:
        raise SystemExit(f"no part '{name}'. Expected some of {list(PARTS)}.")
    return (0 if name in SHARED else 2 if name == "sanitize" else 1), list(PARTS).index(name)


def main(given: argparse.Namespace) -> None:
    run = Run(given)
    asked = given.only.split(",") if given.only else [p for p in PARTS if p not in OPTIONAL]
    groups = [g for name, _, g in (one.partition("@") for one in asked) if name == "sanitize" and g]
    names = sorted({one.partition("@")[0] for one in asked}, key=order)
    if run.start():
        shares = sum(PARTS[n] for n in names)
        seconds = [(run.left - 10) * PARTS[n] / shares for n in names]
        ends = {n: time.monotonic() + t for n, t in zip(names, accumulate(seconds), strict=True)}
        for name in names:
            if name in SHARED:
                run.shared(name, ends[name])
        alone = [n for n in names if n not in SHARED and n != "sanitize"]
        if alone:
            run.parts(alone, [ends[n] for n in alone])
        if "sanitize" in names:
            worker = [*run.command(), "--workers", "1", "--part"]
            end = time.monotonic() + run.left - 5
            sanitizer.run(worker, given.sanitize_jobs, end, groups or sanitizer.GROUPS, run.keep)
    text = table(run.results, time.monotonic() - run.started, TABLED, CHECKED)
    if given.out is not None:
        (given.out / "gpu.md").write_text(text + "\n")
    print("\n" + text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.jsonl and gpu.md")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--minutes", type=float, default=8, help="of the whole run")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--emulate", action="store_true", help="with --device cpu: CUDA's kernels")
    parser.add_argument("--models", default=".gpu/kl", help="folder made by on_gpu/kl.py")
    parser.add_argument("--workers", type=int, default=min(7, max(1, CORES // 2)))
    parser.add_argument("--sanitize-jobs", type=int, default=6, help="sanitizers at a time")
    parser.add_argument("--part", help="internal: run the cases of parts, NAME@END,...")
    parser.add_argument("--first", type=int, default=0, help="internal: the first case to run")
    parser.add_argument("--turn", type=int, default=0, help="internal: of `--workers`")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    work(chosen) if chosen.part else main(chosen)
