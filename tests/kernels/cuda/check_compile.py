"""Compile the CUDA kernels for every generation of cards, and print their registers and spills.

    python -m tests.kernels.cuda.check_compile

Needs no card. Where NVRTC is not installed it says so and ends. It fails on a source that does not
compile, and on a kernel that spills more bytes than `SPILLS` allows. Kernels with a variant for
each group size and number of planes are compiled for groups of 128 and one plane. All takes about
70 seconds of processor time.
"""

from __future__ import annotations

import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moepress.errors import MoepressError
from moepress.kernels.cuda import compiler, launch

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
VARIANT = ("MOEPRESS_GROUP=128", "MOEPRESS_PLANES=1")
SPILLS = {  # bytes that a kernel may spill, all loads and stores of its program
    # Three blocks of a multiprocessor, of 80 registers: others hide what a step of one waits for.
    # The sum of seven widths; half of it at 1.5 bits, where a thread has two sets of values.
    # NVRTC 13.5 spills 648 bytes of it, 44 of drop and 8 of dequantize; older ones 640, 16 and 0.
    "moepress_viterbi_search": 648,
    # A few, once a thread.
    "moepress_combine_experts": 16,
    "moepress_drop": 44,
    "moepress_cache_write": 16,
    "moepress_dequantize_trellis": 8,
    "moepress_gated_any": 16,
    "moepress_attention_bf16_g128_p1": 16,
    "moepress_attention_f16_g128_p1": 16,
}


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes: registers of a thread, bytes of spilled registers (stores and loads)."""

    name: str
    registers: int
    spilled: int


def variant_of(source: str) -> tuple[str, ...]:
    """The macros for one variant of a source, if it has variants."""
    return VARIANT if "MOEPRESS_GROUP" in (compiler.HERE / f"{source}.cu").read_text() else ()


def compiled(source: str, capability: tuple[int, int]) -> list[Kernel]:
    """Compile a .cu file, without the cache.

    Raises:
        MoepressError: NVRTC does not know the card, or refuses the source.
    """
    nvrtc, _ = compiler._nvrtc()
    text, headers = compiler._sources(source)
    options = (
        f"--gpu-architecture={compiler.architecture(capability)}",
        *compiler.OPTIONS,
        "--ptxas-options=-v",
        *(f"-D{define}" for define in variant_of(source)),
    )
    return kernels_of(compiler._compile(nvrtc, source, text, headers, options)[1])


def kernels_of(log: str) -> list[Kernel]:
    """The kernels that ptxas -v lists. The spills of functions that are not inlined count too."""
    found: list[Kernel] = []
    for part in log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            raise MoepressError(f"NVRTC's log has no line on registers:\n{part}")
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", part)))
        found.append(Kernel(part.partition("'")[0], int(registers[1]), spilled))
    return found


def main() -> int:
    """Compile everything, print a table, and return the exit code."""
    reason = compiler.missing()
    if reason is not None:
        print(f"SKIPPED: the CUDA kernels are not compiled: {reason}")
        return 0
    started = time.perf_counter()
    tasks = [(source, c) for c in CAPABILITIES for source in launch.SOURCES]
    table: dict[str, dict[tuple[int, int], Kernel]] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = [(*task, pool.submit(compiled, *task)) for task in tasks]
    for source, capability, result in results:
        error = result.exception()
        if error is not None:
            failed.append(f"{source}.cu, {capability[0]}.{capability[1]}: {error}")
            continue
        for kernel in result.result():
            table.setdefault(kernel.name, {})[capability] = kernel
            if kernel.spilled > SPILLS.get(kernel.name, 0):
                failed.append(
                    f"{kernel.name}, {capability[0]}.{capability[1]}: {kernel.spilled} bytes of "
                    f"registers are spilled, allowed are {SPILLS.get(kernel.name, 0)}"
                )
    print("registers of a thread, + bytes of spills, by compute capability")
    width = max(map(len, table), default=0)
    print(" " * width, *(f"{f'{major}.{minor}':>9}" for major, minor in CAPABILITIES))
    for name, row in table.items():
        print(f"{name:<{width}}", *(f"{_cell(row.get(c)):>9}" for c in CAPABILITIES))
    version = ".".join(map(str, compiler._nvrtc()[1]))
    print(f"{len(tasks)} compilations with NVRTC {version}: {time.perf_counter() - started:.0f} s")
    for line in failed:
        print("FAILED:", line)
    return 1 if failed else 0


def _cell(kernel: Kernel | None) -> str:
    if kernel is None:
        return "-"
    return f"{kernel.registers}" + (f"+{kernel.spilled}" if kernel.spilled else "")


if __name__ == "__main__":
    sys.exit(main())
