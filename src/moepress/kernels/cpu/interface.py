"""The compiled library behind its C interface (moepress.h): loading it, calling it, its errors."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moepress.errors import InputError, MoepressError

INTERFACE = 13  # version of moepress.h

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # MoepressNumbers

READ_FAILED = 8
RESULTS = {
    1: "no codec has those code bits, that group size and that row length",
    2: "a matrix reaches outside its packed bytes",
    3: "a size is out of range",
    4: "unknown activation",
    5: "an embedding id lies outside the table: the tokenizer does not belong to this model",
    6: "activation bits are 8 or 16",
    7: "out of memory",
    READ_FAILED: "an expert cannot be read",
    9: "this process is a copy (fork) of the one that opened the model: open it here",
    10: "this system cannot keep experts on disk",
    11: "a token is written outside of the room of a cache",
}

SIGNATURES = {
    "moepress_scalar_linear": (
        c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p,
        c_int32, c_int32, c_int32, c_void_p,
    ),
    "moepress_scalar_experts": (
        c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p,
        c_int32, c_void_p, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p,
        c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p,
    ),
    "moepress_scalar_embedding": (
        c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p,
    ),
    "moepress_drop": (
        c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p, c_void_p,
        c_void_p, c_void_p,
    ),
    "moepress_trellis_linear": (
        c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p,
        c_int32, c_int32, c_int32, c_void_p,
    ),
    "moepress_trellis_experts": (
        c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p,
        c_int32, c_void_p, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p,
        c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p,
    ),
    "moepress_trellis_search": (c_void_p, c_void_p, c_int64, c_int32, c_int32, c_void_p),
    "moepress_trellis_values": (c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p),
    "moepress_trellis_pack": (c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p),
    "moepress_trellis_fit": (
        c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32,
        c_void_p, c_void_p,
    ),
    "moepress_trellis_rows": (
        c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p,
    ),
    "moepress_trellis_rotate": (c_void_p, c_int64, c_int64, c_int32, c_int32),
    "moepress_rms_norm": (
        c_void_p, c_int32, c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int32, c_float,
        c_int32, c_int32, c_void_p,
    ),
    "moepress_add": (c_void_p, c_void_p, c_int64, c_int32, c_void_p),
    "moepress_rotary": (
        c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64,
        c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int64, c_int64, c_int64, c_int64,
        c_int32, c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64,
    ),
    "moepress_cache_write": (
        c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int32,
        c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int32,
        c_int64, c_int64, c_int64, c_void_p,
    ),
    "moepress_route": (
        c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_int64, c_void_p, c_int32,
        c_void_p, c_int32, c_int64, c_void_p, c_int32, c_void_p, c_void_p, c_void_p,
    ),
    "moepress_attention": (
        c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64,
        c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_int64, c_int64, c_int64, c_int64,
        c_int64, c_int64, c_int64, c_int64, c_float, c_int32, c_int32, c_void_p,
    ),
}  # fmt: skip

Repeat = Callable[[], None]
Failures = Mapping[int, Callable[[], Exception]]
_NONE: Failures = {}
_local = threading.local()  # .record: what a thread's calls are given to


def call(name: str, *arguments: Any, failures: Failures = _NONE) -> None:
    """Call a function of the library.

    Args:
        name: of moepress.h.
        arguments: numbers, addresses, structures by `byref`.
        failures: errors in place of InputError, by the number that the function returns.

    Raises:
        InputError: it refuses its arguments.
    """
    function = getattr(library(), name)
    code: int = function(*arguments)
    if code:
        raise _failure(name, code, failures)
    record: Callable[[Repeat], object] | None = getattr(_local, "record", None)
    if record is not None:
        record(_repeat(name, function, arguments, failures))


@contextmanager
def recorded(record: Callable[[Repeat], object]) -> Iterator[None]:
    """While it is entered, `record` gets a function for each call of this thread: it calls again.

    With the same addresses: what is there must live as long as the function.
    """
    before = getattr(_local, "record", None)
    _local.record = record
    try:
        yield
    finally:
        _local.record = before


def _repeat(
    name: str, function: Callable[..., int], arguments: Sequence[Any], failures: Failures
) -> Repeat:
    def repeat() -> None:
        code = function(*arguments)
        if code:
            raise _failure(name, code, failures)

    return repeat


def _failure(name: str, code: int, failures: Failures) -> Exception:
    if code in failures:
        return failures[code]()
    return InputError(f"{name}: {RESULTS.get(code, f'error {code}')}.")


@lru_cache(maxsize=1)
def library() -> CDLL:
    """The compiled library.

    Raises:
        MoepressError: it is missing, cannot be loaded, or is of another version.
    """
    folders = sys.modules[__package__].__path__
    path = next((p for folder in folders for p in Path(folder).glob("libmoepress_cpu.*")), None)
    if path is None:
        raise MoepressError(
            "it was not compiled, because no C++ compiler was found when moepress was installed. "
            "Install one (g++ or clang) and install moepress again"
        )
    try:
        library = CDLL(str(path))
    except OSError as error:
        raise MoepressError(f"{path.name} cannot be loaded: {error}") from error
    try:
        same = library.moepress_interface() == INTERFACE
        if same:
            _declare(library)
    except AttributeError:  # a function that is not there
        same = False
    if not same:
        raise MoepressError(f"{path.name} is of another version. Install moepress again")
    library.moepress_lend_team(openmp_team())
    return library


def _declare(library: CDLL) -> None:
    """Tell ctypes the signatures of the library's functions.

    Raises:
        AttributeError: it lacks one.
    """
    library.moepress_instruction_sets.restype = c_char_p
    library.moepress_use.argtypes = (c_char_p,)
    library.moepress_lend_team.argtypes = (c_void_p,)
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = c_int32


def openmp_team() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; None without one.

    Symbols are looked up in libtorch_cpu and in the libraries that it needs.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(CDLL(str(path)).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
