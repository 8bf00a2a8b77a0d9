"""Check and time the CUDA kernels on a real card: one command, table last.

    PYTHONPATH=src python3 benchmarks/gpu.py [--out FOLDER] [--only checks,ops] [--minutes 8]

Needs torch and transformers, and nothing of moepress that is compiled: the reference backend on the
CPU is the oracle. Weights are random and made on the card. Each part runs in processes of its own,
so that a kernel that fails or hangs costs one case and not the run. Results go to stdout and, as
lines of JSON, to FOLDER/gpu.jsonl; the table is in FOLDER/gpu.md too.

    checks     every op against the oracle; CUDA graphs
    ops        the MoE op of Mixtral-8x7B with few tokens, beside copy bandwidth; its kernels
    prefill    the MoE op with many tokens, beside torch's grouped bfloat16 product
    model      decoding with Mixtral-8x7B's shape at 2.5 bits, beside transformers in bfloat16
    divided    experts on the card and on the CPU: half of a layer, and of the models of `kl`
    kl         small compressed models beside the same on the CPU (folder made by on_gpu/kl.py)
    search     the trellis search
    shapes     the MoE op of other models with few tokens; the linear op
    compile    torch.compile of a packed block
    sanitize   compute-sanitizer on a small run of every kernel
    compress   compression of two layers of Mixtral-8x7B's shape (only when named)

`--device cpu --tiny` proves the script on a machine without a card, and with `--emulate` the
kernels too, in the emulator of tests/kernels/cuda.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from on_gpu.case import Case, Row

PARTS = {  # name: share of the time
    "checks": 0.3,
    "ops": 0.1,
    "prefill": 0.1,
    "model": 0.2,
    "divided": 0.06,
    "kl": 0.08,
    "search": 0.06,
    "shapes": 0.15,
    "compile": 0.12,
    "sanitize": 0.12,
    "compress": 0.3,
}
OPTIONAL = ("compress",)  # run only when named
RESTARTS = 12  # of a worker that died
START_SECONDS = 90  # to import torch and to reach the first case
BACKEND = "the cuda backend runs here"  # a case of checks.py
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
        for case in cases_of(part, card, given):
            number += 1
            if number < given.first:
                continue
            say(event="start", number=number, part=part, case=case.name, seconds=case.seconds)
            started = time.perf_counter()
            end: Row
            if until and time.time() > float(until):
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


def cases_of(part: str, card: Any, given: argparse.Namespace) -> Iterator[Case]:
    from importlib import import_module

    homes = {"prefill": "ops", "shapes": "ops", "compress": "search"}
    if part == "sanitized":
        yield Case("all kernels", import_module("on_gpu.checks").sanitized(card), 600)
    elif part in ("divided", "kl"):
        yield from import_module(f"on_gpu.{part}").cases(card, Path(given.models))
    elif part == "compile":
        yield from import_module("on_gpu.checks").compile_cases(card)
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
        self.file = None
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            self.file = (given.out / "gpu.jsonl").open("a")

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, **row: Any) -> None:
        self.results.append(row)
        if self.file is not None:
            print(json.dumps(row), file=self.file, flush=True)
        print(f"[{time.monotonic() - self.started:5.0f} s] {short(row)}", flush=True)

    def parts(self, names: Sequence[str], ends: Sequence[float]) -> None:
        """Run the cases of parts, each until its end (monotonic seconds)."""
        first, offset = 0, time.time() - time.monotonic()
        passed = ",".join(f"{n}@{e + offset:.0f}" for n, e in zip(names, ends, strict=True))
        for _ in range(RESTARTS):
            first, finished = self._worker(passed, first, ends[-1])
            if finished or time.monotonic() > ends[-1]:
                return

    def _worker(self, parts: str, first: int, end: float) -> tuple[int, bool]:
        """Run one worker: (the case to continue with, whether all are finished)."""
        command = [sys.executable, __file__, "--part", parts, "--first", str(first)]
        process = subprocess.Popen(
            command + self._passed(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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

    def _passed(self) -> list[str]:
        passed = ["--device", self.given.device, "--models", str(self.given.models)]
        switches = [f"--{name}" for name in ("tiny", "emulate") if getattr(self.given, name)]
        return passed + switches

    def sanitize(self, seconds: float) -> None:
        tool = sanitizer()
        if tool is None:
            self.keep(part="sanitize", case="start", ok=False, error="no compute-sanitizer here")
            return
        end = min(self.deadline, time.monotonic() + seconds)
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "9"]
            if check == "racecheck":  # slow: ours alone
                command += ["--kernel-name", "kernel_substring=moepress"]
            command += [sys.executable, __file__, "--part", "sanitized", *self._passed()]
            setting = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            started = time.monotonic()
            limit = max((end - started) / (2 if check == "memcheck" else 1), 5)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=setting, text=True
            )
            try:
                text, _ = process.communicate(timeout=limit)
                lines = text.splitlines()
                told = [x for x in lines if x.startswith("=========")]
                done = any('"ok": true' in x for x in lines)
                ok = process.returncode == 0 and done
                error = f"exit code {process.returncode}, all kernels ran: {done}"
                trace = told[:30] + ([] if ok else lines[-8:])
            except subprocess.TimeoutExpired:
                process.kill()
                ok, error, trace = False, f"not done in {limit:.0f} s", []
            row: Row = {"rows": [{"told": told[-1] if told else ""}]} if ok else {"error": error}
            took = time.monotonic() - started
            self.keep(part="sanitize", case=check, ok=ok, took=took, trace=trace, **row)


def _read(process: subprocess.Popen[bytes], lines: queue.Queue[bytes | None]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def sanitizer() -> str | None:
    name = "compute-sanitizer"
    folders = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/bin")
    found = next((p for p in (Path(f) / name for f in folders) if p.is_file()), None)
    return shutil.which(name) or (str(found) if found else None)


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


# The table


def table(results: list[Row], started: float) -> str:
    """Counts of checks, what failed, and all measured figures."""
    lines = []
    checks = [
        r
        for r in results
        if r["part"] in ("checks", "divided", "kl", "search", "compile", "sanitize")
    ]
    good = sum(r["ok"] for r in checks)
    failed = [f"{r['part']}: {r['case']}: {r['error'][:300]}" for r in results if not r["ok"]]
    lines += [f"checks passed: {good} of {len(checks)}; {time.monotonic() - started:.0f} s in all"]
    lines += [f"FAILED {text}" for text in failed]
    for part in PARTS:
        rows = [
            {"case": r["case"], **row}
            for r in results
            if r["part"] == part and r["ok"] and part not in ("checks", "compile")
            for row in r.get("rows") or []
        ]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row), []).append(row)
        for names, members in groups.items():
            lines += ["", f"{part} | " + " | ".join(names)]
            lines += [" | ".join(figure(row[name]) for name in names) for row in members]
    return "\n".join(lines)


def main(given: argparse.Namespace) -> None:
    run = Run(given)
    names = given.only.split(",") if given.only else [p for p in PARTS if p not in OPTIONAL]
    unknown = set(names) - set(PARTS)
    if unknown:
        raise SystemExit(f"no part {sorted(unknown)}. Expected some of {list(PARTS)}.")
    shares = sum(PARTS[n] for n in names)
    seconds = [(run.left - 10) * PARTS[n] / shares for n in names]
    ends = [time.monotonic() + t for t in accumulate(seconds)]
    in_workers = [i for i, name in enumerate(names) if name != "sanitize"]
    if in_workers:
        run.parts([names[i] for i in in_workers], [ends[i] for i in in_workers])
    if "sanitize" in names:
        run.sanitize(run.left - 5)
    text = table(run.results, run.started)
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
    parser.add_argument("--part", help="internal: run the cases of parts, NAME@END,...")
    parser.add_argument("--first", type=int, default=0, help="internal: the first case to run")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    work(chosen) if chosen.part else main(chosen)
