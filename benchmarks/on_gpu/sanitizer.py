"""compute-sanitizer on each group of kernels (sanitized.py), in processes of their own.

    memcheck   accesses outside of memory, and misaligned ones
    racecheck  accesses to shared memory that nothing orders

racecheck runs with launches that do not overlap (MOEPRESS_OVERLAP=0). With overlap, and all kernels
in one process, it ended with an internal error on an H200; of what, it did not say.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from on_gpu.case import Row

TOOLS = ("memcheck", "racecheck")
GROUPS = (  # of sanitized.py, which imports torch; slowest first
    "trellis_prefill",
    "trellis_decode",
    "grouped",
    "gates",
    "int_prefill",
    "int_decode",
    "search",
    "embedding",
    "rotation",
    "attention",
    "route",
    "small",
    "drawn",
    "values",
    "linears",
)
FOUND = 9  # exit code where the tool reports something
SECONDS = 150  # of one process, at most
LINES = 30  # of the tool's report that are kept
OPTIONS = {
    # Errors of the API are no errors of kernels: cuda-bindings asks for functions that a driver
    # may not have.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--kernel-name", "kernel_substring=moepress"),  # slow: ours alone
}


def path() -> str | None:
    """Where compute-sanitizer is, or None."""
    name = "compute-sanitizer"
    folders = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/bin")
    found = next((p for p in (Path(f) / name for f in folders) if p.is_file()), None)
    return shutil.which(name) or (str(found) if found else None)


def run(
    worker: Sequence[str], jobs: int, end: float, groups: Sequence[str], keep: Callable[..., None]
) -> None:
    """Run all tools on all groups.

    Args:
        worker: the command that runs a group, but for its last argument, which names it.
        jobs: processes at a time.
        end: when to stop, in monotonic seconds.
        groups: of `GROUPS`.
        keep: gets the fields of each result.
    """
    tool = path()
    if tool is None:
        keep(part="sanitize", case="start", ok=False, error="no compute-sanitizer here")
        return

    def one(job: tuple[str, str]) -> None:
        keep(part="sanitize", **sanitize(tool, *job, worker, end))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [(check, group) for check in TOOLS for group in groups]))


def sanitize(tool: str, check: str, group: str, worker: Sequence[str], end: float) -> Row:
    """The result of one tool for one group."""
    started = time.monotonic()
    limit = min(SECONDS, end - started)
    case: Row = {"case": f"{check} {group}"}
    if limit < 1:
        return case | {"ok": False, "error": "no time left"}
    command = [tool, "--tool", check, "--error-exitcode", str(FOUND), *OPTIONS[check]]
    setting = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if check == "racecheck":
        setting["MOEPRESS_OVERLAP"] = "0"
    try:
        done = subprocess.run(
            [*command, *worker, f"sanitized@{group}"],
            capture_output=True,
            text=True,
            errors="replace",
            env=setting,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return case | {"ok": False, "error": f"not done in {limit:.0f} s"}
    lines = (done.stdout + done.stderr).splitlines()
    return (
        case | {"took": time.monotonic() - started} | verdict(check, group, done.returncode, lines)
    )


def verdict(check: str, group: str, code: int, lines: Sequence[str]) -> Row:
    """What the tool said: its last line and, where it found something, the first ones."""
    told = [line for line in lines if line.startswith("=========") and "Host Frame" not in line]
    finished = any('"event": "end"' in line and '"ok": true' in line for line in lines)
    last = told[-1].strip("= ") if told else "nothing"
    if code == 0 and finished:
        return {"ok": True, "rows": [{"tool": check, "group": group, "said": last}]}
    named = sorted(set(re.findall(r"moepress_\w+", "\n".join(told))))
    error = f"{last}; exit code {code}, all kernels ran: {finished}, kernels named: {named}"
    rest = [] if finished else [x for x in lines if not x.startswith("=========")][-8:]
    return {"ok": False, "error": error, "trace": [*told[:LINES], *rest]}
