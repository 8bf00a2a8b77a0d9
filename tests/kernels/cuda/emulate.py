"""Kernels of moepress.kernels.cuda on the CPU: emulator.h, compiled together with a .cu file.

    launch("moepress_combine", grid=(1, 1, 1), block=256, shared=0, args=[tensor, None, 3, 0.5])

runs a kernel on CPU tensors, as moepress.kernels.cuda.launch does on a card. Each storage is copied
to memory that ends at a page without access, and back after the launch. An access out of bounds, a
deadlock and a trap raise `EmulationError`.

With `EMULATED_RACES=1` in the environment so does a race, an access that nothing orders
(races.cpp). That takes several times as long.

Kernels of a test's own: `library(path)` compiles any file that includes "device.h".
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
from torch import Tensor

import moepress.kernels.cuda as cuda

SOURCES = Path(next(iter(cuda.__path__)))
HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("c++")
OPTIONS = (
    "-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-ffp-contract=off",
    "-fno-strict-aliasing", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-Wno-parentheses", "-Wno-unused-function",
    f"-I{SOURCES}", f"-I{SOURCES.parent / 'cpu'}", f"-I{HERE}",
)  # fmt: skip
# Linked without the sanitizer's library: emulator.h has what it calls.
ALIGNMENT = "-fsanitize=alignment"
RACES = os.environ.get("EMULATED_RACES", "0") == "1"
PAGE = mmap.PAGESIZE
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_SHARED = 99 << 10  # bytes of a block, on cards of compute capability 8.6, 8.9 and 12.0

RACES_SOURCE = HERE / "races.cpp"

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

Argument = Tensor | int | float | None


class EmulationError(Exception):
    """A kernel did what a card would punish, or not even notice."""


def launch(
    kernel: str, grid: tuple[int, int, int], block: int, shared: int, args: Sequence[Argument]
) -> None:
    """Run a kernel of the package, named `moepress_` and the name of its file, on CPU tensors."""
    names = (p.stem for p in SOURCES.glob("*.cu") if kernel.startswith(f"moepress_{p.stem}"))
    run(SOURCES / f"{max(names, key=len)}.cu", kernel, grid, block, shared, args)


def run(
    source: Path,
    kernel: str,
    grid: tuple[int, int, int],
    block: int,
    shared: int,
    args: Sequence[Argument],
    races: bool = RACES,
) -> None:
    """Run a kernel of any file on CPU tensors. `races`: whether a race is an error."""
    check_limits(kernel, grid, block, shared)
    compiled = library(source, races)
    entry = getattr(compiled, f"emulated_{kernel}")
    guarded = {t.untyped_storage().data_ptr(): Guarded(t) for t in args if isinstance(t, Tensor)}
    words = [
        struct.pack("f", a) + bytes(4)
        if isinstance(a, float)
        else struct.pack("q", a)
        if isinstance(a, int)
        else struct.pack("Q", 0 if a is None else guarded[a.untyped_storage().data_ptr()].at(a))
        for a in args
    ]
    if races:
        for copy in guarded.values():
            compiled.emulated_watch(ctypes.c_void_p(copy.start), ctypes.c_int64(copy.size))
    error = ctypes.create_string_buffer(512)
    failed = entry(
        (ctypes.c_uint32 * 3)(*grid),
        block,
        ctypes.c_int64(shared),
        b"".join(words),
        len(args),
        error,
        len(error),
    )
    for copy in guarded.values():
        copy.close()
    if failed:
        raise EmulationError(f"{kernel}: {_with_lines(compiled, error.value.decode())}")


def check_limits(kernel: str, grid: tuple[int, int, int], block: int, shared: int) -> None:
    """Raise EmulationError for a launch that the driver refuses on some of the supported cards."""
    if any(not 0 < n <= most for n, most in zip(grid, MOST_BLOCKS, strict=True)):
        raise EmulationError(f"{kernel}: a grid {grid}, of 1 to {MOST_BLOCKS} blocks on a card")
    if not 0 < block <= 1024 or shared > MOST_SHARED:
        raise EmulationError(
            f"{kernel}: blocks of {block} threads, {shared} bytes of shared memory"
        )


class Guarded:
    """A copy of a tensor's storage that ends where a page without access begins."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()
        self.size = size = self.storage.nbytes()
        room = -(-size // PAGE) * PAGE
        self.length = room + PAGE
        libc = _libc()
        pages = libc.mmap(None, self.length, 3, 0x22, -1, 0)  # read and write, private, anonymous
        libc.mprotect(pages + room, PAGE, 0)
        self.pages = pages
        self.start = pages + (room - size) // 16 * 16  # aligned as the loads of 16 bytes need it
        ctypes.memmove(self.start, self.storage.data_ptr(), size)

    def at(self, tensor: Tensor) -> int:
        """Address of a tensor of this storage: null if it has no elements, as `data_ptr`."""
        if not tensor.numel():
            return 0
        return int(self.start + tensor.data_ptr() - self.storage.data_ptr())

    def close(self) -> None:
        ctypes.memmove(self.storage.data_ptr(), self.start, self.storage.nbytes())
        _libc().munmap(self.pages, self.length)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.mprotect.argtypes = (address, size, number)
    libc.munmap.argtypes = (address, size)
    return libc


@lru_cache(maxsize=64)
def library(source: Path, races: bool = RACES) -> ctypes.CDLL:
    """A .cu file, compiled for the CPU; kept in the folder for temporary files, by content."""
    files = [source, *SOURCES.glob("*.h"), *SOURCES.glob("*.cuh"), *HERE.glob("*.h"), RACES_SOURCE]
    files.append(SOURCES.parent / "cpu/trellis_code.h")
    if source.parent != SOURCES:  # it may include one of these
        files += SOURCES.glob("*.cu")
    key = hashlib.sha256(str((COMPILER, OPTIONS, ALIGNMENT, races)).encode())
    for file in files:
        key.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"moepress-emulated-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{source.stem}-{key.hexdigest()[:20]}.so"
    if not path.exists():
        _compile(source, path, races)
    return ctypes.CDLL(str(path))


def _compile(source: Path, path: Path, races: bool) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit = Path(folder) / "unit.cpp"
        text = f'#include "{source}"\n'
        unit.write_text(text)
        listed = _run("-E", "-P", "-DEMULATOR_LIST_KERNELS", str(unit))
        names = re.findall(r"__global__[^;{}]*?\b(moepress_\w+)\s*\(", listed)
        unit.write_text(text + "".join(f"EMULATED_KERNEL({name})\n" for name in names))
        made = Path(folder) / path.name
        if races:  # linked without the sanitizer, whose library races.cpp replaces
            watched, watching = Path(folder) / "unit.o", Path(folder) / "races.o"
            with_lines = ("-gdwarf-4", "-DEMULATED_RACES", "-c")
            _run(*with_lines, f"{ALIGNMENT},thread", str(unit), "-o", str(watched))
            _run(*with_lines, str(RACES_SOURCE), "-o", str(watching))
            _run(str(watched), str(watching), "-ldl", "-o", str(made))
        else:
            checked = Path(folder) / "unit.o"
            _run("-c", ALIGNMENT, str(unit), "-o", str(checked))
            _run(str(checked), "-o", str(made))
        made.replace(path)


def _run(*arguments: str) -> str:
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, *OPTIONS, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EmulationError(done.stderr)
    if done.stderr:
        print(done.stderr)  # warnings, shown when a test fails
    return done.stdout


def _with_lines(compiled: ctypes.CDLL, message: str) -> str:
    """Addresses in the library, "<1a2b>", as lines of kernels where binutils are installed."""
    tool = shutil.which("addr2line")

    def line(address: re.Match[str]) -> str:
        asked = (str(tool), "-i", "-e", str(compiled._name), address[1])
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        lines = [Path(text.split(" ")[0]).name for text in found.splitlines()]
        of_kernels = [text for text in lines if re.search(r"\.cuh?:", text)]
        return (of_kernels or lines or [address[0]])[0]

    return re.sub(r"<([0-9a-f]+)>", line, message) if tool else message
