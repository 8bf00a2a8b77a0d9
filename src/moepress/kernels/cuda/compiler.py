"""Compile a kernel's source with NVRTC, and keep the result on disk.

NVRTC is NVIDIA's compiler as a library. torch's CUDA wheels bring it, and cuda-bindings, through
which it is called here. Each .cu file is a program of its own. Its compiled form (a cubin) is kept
under a name that is a hash of all that it depends on, in MOEPRESS_CACHE, or in the user's folder
for caches.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from moepress.errors import MoepressError

HERE = Path(__file__).parent
SHARED = (HERE.parent / "cpu/trellis_code.h",)  # headers of the C++ backend that kernels include
OLDEST = (8, 0)  # compute capability: the kernels need cp.async and products of 8-bit matrices
Program = tuple[str, tuple[str, ...]]  # the name of a .cu file, and macros: see `compiled`
OPTIONS = (
    "--std=c++17",
    "--fmad=false",  # products and sums are rounded one by one, as in the oracles
    "--device-as-default-execution-space",
)


def compiled(name: str, capability: tuple[int, int], defines: tuple[str, ...] = ()) -> bytes:
    """The cubin of `name`.cu for cards of a compute capability; compiled once, then from disk.

    Args:
        defines: macros, each as NAME=VALUE.

    Raises:
        MoepressError: NVRTC is not here, does not know the card, or refuses the source.
    """
    nvrtc, version = _nvrtc()
    arch = architecture(capability)
    source, headers = _sources(name)
    options = (f"--gpu-architecture={arch}", *OPTIONS, *(f"-D{define}" for define in defines))
    parts = (repr((version, options)), source, *(f"{n}\n{text}" for n, text in headers.items()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    folder, file = _cache(), f"{name}-{arch}-{key[:32]}.cubin"
    if folder is not None:
        with suppress(OSError):
            return (folder / file).read_bytes()
    cubin, _ = _compile(nvrtc, name, source, headers, options)
    if folder is not None:
        _keep(folder / file, cubin)
    return cubin


def compile_all(programs: Iterable[Program], capability: tuple[int, int]) -> None:
    """Compile programs at the same time, those that are not on disk: NVRTC runs in threads.

    Raises:
        MoepressError: as `compiled`.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(compiled, name, capability, d) for name, d in programs]:
            done.result()


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for, such as sm_90a: the card's own, or the nearest older of its generation.

    Raises:
        MoepressError: the card is too old, or NVRTC does not know it.
    """
    if capability < OLDEST:
        raise MoepressError(
            f"its kernels need compute capability {_text(OLDEST)}, this card has "
            f"{_text(capability)}"
        )
    nvrtc, version = _nvrtc()
    known = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    wanted = capability[0] * 10 + capability[1]
    fitting = [arch for arch in known if wanted // 10 * 10 <= arch <= wanted]
    if not fitting:
        raise MoepressError(
            f"NVRTC {_text(version)} does not compile for compute capability {_text(capability)}. "
            "Install a torch with a newer CUDA"
        )
    # "a": with the instructions of this very generation, here products of whole warpgroups.
    return f"sm_{max(fitting)}" + ("a" if max(fitting) == 90 else "")


def missing() -> str | None:
    """The reason why sources cannot be compiled, or None if they can."""
    try:
        _nvrtc()
    except MoepressError as error:
        return str(error)
    return None


def _sources(name: str) -> tuple[str, dict[str, str]]:
    """The text of a .cu file, and of the headers that it includes, by their names in includes."""
    known = {p.name: p for p in (*HERE.glob("*.h"), *HERE.glob("*.cuh"), *SHARED)}
    source = (HERE / f"{name}.cu").read_text()
    headers: dict[str, str] = {}
    unread = [source]
    while unread:
        for header in re.findall(r'^#include "(.+)"', unread.pop(), re.MULTILINE):
            if header in known and header not in headers:
                headers[header] = known[header].read_text()
                unread.append(headers[header])
    return source, headers


def _compile(
    nvrtc: Any, name: str, source: str, headers: dict[str, str], options: tuple[str, ...]
) -> tuple[bytes, str]:
    """The cubin of a source, and what the compiler says."""
    texts, names = [t.encode() for t in headers.values()], [n.encode() for n in headers]
    program = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            source.encode(), f"{name}.cu".encode(), len(headers), texts, names
        ),
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise MoepressError(f"NVRTC refuses {name}.cu ({' '.join(options)}):\n{_log(log)}")
        cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin), _log(log)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _log(log: bytearray) -> str:
    return bytes(log).rstrip(b"\0").decode(errors="replace").strip()


def _cache() -> Path | None:
    """The folder of compiled kernels; None: this user has no home, as in some containers."""
    own = os.environ.get("MOEPRESS_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "moepress" / "cuda"
    except RuntimeError:
        return None


def _keep(path: Path, cubin: bytes) -> None:
    """Write a file whole or not at all. A folder that cannot be written costs time, no more."""
    written: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            written = Path(file.name)
            file.write(cubin)
        written.replace(path)
    except OSError:
        if written is not None:
            with suppress(OSError):
                written.unlink()


@lru_cache(maxsize=1)
def _nvrtc() -> tuple[Any, tuple[int, int]]:
    """The module cuda.bindings.nvrtc, and the version of NVRTC."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MoepressError(
            f"cuda-bindings cannot be imported ({error}). Install it: pip install cuda-bindings"
        ) from error
    try:
        result, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # what cuda-bindings raises differs between its versions
        raise MoepressError(
            f"NVRTC cannot be loaded ({error}). Install it: pip install nvidia-cuda-nvrtc"
        ) from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise MoepressError(f"NVRTC does not run: {result.name}")
    return nvrtc, (int(major), int(minor))


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """The value of a call of NVRTC."""
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise MoepressError(f"NVRTC: {error.name}")
    return values[0] if values else None
