"""The compiled library behind its C interface (moepress.h): loading it, calling it, its errors."""

from __future__ import annotations

import ctypes
import sys
from ctypes import CDLL, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from moepress.errors import InputError, MoepressError

INTERFACE = 12  # version of moepress.h

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
    "moepress_trellis_rotate": (c_void_p, c_int64, c_int64, c_int32, c_int32),
    "moepress_attention": (
        c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64,
        c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_int64, c_int64, c_int64, c_int64,
        c_int64, c_int64, c_int64, c_int64, c_float, c_int32, c_int32, c_void_p,
    ),
}  # fmt: skip


def call(name: str, *arguments: float | None) -> None:
    """Call a function of the library.

    Raises:
        InputError: it refuses its arguments.
    """
    check(name, result(name, *arguments))


def result(name: str, *arguments: float | None) -> int:
    """Call a function of the library; the number that it returns, see RESULTS."""
    code: int = getattr(library(), name)(*arguments)
    return code


def check(name: str, code: int) -> None:
    """Raise InputError if a function of the library refused its arguments."""
    if code:
        raise InputError(f"{name}: {RESULTS.get(code, f'error {code}')}.")


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
    if library.moepress_interface() != INTERFACE:
        raise MoepressError(f"{path.name} is of another version. Install moepress again")
    library.moepress_instruction_sets.restype = c_char_p
    library.moepress_use.argtypes = (c_char_p,)
    library.moepress_lend_team.argtypes = (c_void_p,)
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = c_int32
    library.moepress_lend_team(openmp_team())
    return library


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
