"""The expert store of store.h, opened from Python."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    addressof,
    byref,
    c_double,
    c_int32,
    c_int64,
    c_uint8,
    c_void_p,
)
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn
from weakref import finalize

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moepress.byte_units import size_text
from moepress.errors import CheckpointError, FileError, InputError
from moepress.kernels.cpu.interface import READ_FAILED, RESULTS, library
from moepress.kernels.stores import OPEN, refuse

Ints = npt.NDArray[np.int64]

PAGE = max(4096, mmap.PAGESIZE)  # this and the next two as in store_state.h
HUGE_PAGE = 1 << 21
HUGE_FROM = 8 * HUGE_PAGE  # bytes of a matrix
READERS = 4  # threads that read


@dataclass(frozen=True)
class Place:
    """Where a matrix lies on disk."""

    path: Path
    offset: int  # of its first byte in the file
    nbytes: int


def page_of(nbytes: int) -> int:
    """Bytes of the pages that a matrix lies in. A large matrix is read faster into huge ones."""
    return HUGE_PAGE if nbytes >= HUGE_FROM else PAGE


def pages(place: Place) -> int:
    """Bytes of memory that a matrix takes: whole pages."""
    first, page = place.offset % PAGE, page_of(place.nbytes)
    return -(-(first + place.nbytes) // page) * page if place.nbytes else 0


@dataclass(frozen=True)
class StoreCounts:
    """What a store did since it was opened (MoepressStoreCounts of moepress.h)."""

    tokens: int  # that passed the first layer
    uses: int  # experts that calls of the op needed, each counted once a call
    hits: int  # of those, present when the call came
    bytes_used: int  # of the needed ones
    reads: int  # experts read
    bytes_read: int
    dropped: int  # experts that made room
    bytes_held: int
    seconds_waited: float  # calls waiting for reads


class _Counts(Structure):
    _fields_ = (
        *((name, c_int64) for name in list(StoreCounts.__annotations__)[:-1]),
        ("seconds_waited", c_double),
    )


class _Failure(Structure):
    _fields_ = (("error", c_int32), ("fd", c_int64))


class ExpertStore:
    """A budget of memory that holds some of a model's experts; the others are read when needed.

    Bytes of the region outside the experts that are in memory read as zeros: use `hold`, or the op,
    which holds what it needs.

    Args:
        matrices: [L][E] pairs: where gate_up and down of each expert lie. 0 bytes: left out.
        uses: [L][E] what to take for the number of uses so far, each of which counts half after
            `half_life` tokens. Experts of fewer uses make room first.
        half_life: in tokens.
        budget: bytes of memory, in whole pages of each matrix.
        readers: threads that read.
        direct: read past the page cache, where the system can.

    Raises:
        CheckpointError: a file cannot be opened, or ends before a matrix does.
        InputError: the budget does not hold the largest expert, or the system has no such store.
    """

    def __init__(
        self,
        matrices: Sequence[Sequence[tuple[Place, Place]]],
        uses: Sequence[npt.ArrayLike],
        half_life: float,
        budget: int,
        *,
        readers: int = READERS,
        direct: bool = True,
    ) -> None:
        self.budget = budget
        self.expected_misses = 0.0  # share of the choices, for pruning; set by who knows it
        self._first = np.cumsum([0, *(len(layer) for layer in matrices)], dtype=np.int64)
        flat = [place for layer in matrices for pair in layer for place in pair]
        self._paths: dict[int, Path] = {}
        try:
            opened = self._open({place.path for place in flat if place.nbytes}, direct)
            ranges = _ranges(flat, opened)
            self._check(flat, opened)
            given = np.ascontiguousarray(np.concatenate([np.asarray(u) for u in uses]), np.float64)
            if len(given) != self._first[-1]:
                raise InputError(
                    f"uses has {len(given)} numbers for {self._first[-1]} experts. Expected one "
                    "each."
                )
            handle = c_void_p()
            _check(
                _functions().moepress_store_open(
                    ranges.ctypes.data, self._first.ctypes.data, len(matrices), given.ctypes.data,
                    half_life, budget, readers, byref(handle),
                )
            )  # fmt: skip
        except BaseException:
            _close_files(self._paths)
            raise
        assert handle.value is not None
        self.number = handle.value
        nbytes = c_int64()
        start = _functions().moepress_store_region(self.number, byref(nbytes))
        memory = (c_uint8 * max(nbytes.value, 1)).from_address(start)
        # The tensor keeps `memory` alive, and so the store.
        self._close = finalize(memory, _close, self.number, self._paths)
        self._close.atexit = False
        self.region: Tensor = torch.frombuffer(memory, dtype=torch.uint8)
        places = torch.from_numpy(ranges[:, 3].copy()).view(-1, 2)
        self.places = torch.split(places, [len(layer) for layer in matrices])  # [L] [E, 2]
        self.nbytes = sum(map(pages, flat))  # of all experts
        OPEN[self.number] = self

    def __reduce__(self) -> NoReturn:
        refuse("saved or copied")

    @contextmanager
    def hold(self, layer: int, experts: Iterable[int]) -> Iterator[None]:
        """Context in which experts of a layer are in memory. Meanwhile the op gets no others.

        Raises:
            InputError: they do not fit in the budget together.
            CheckpointError: one cannot be read.
        """
        ids = np.array(sorted(experts), dtype=np.int64)
        held = c_void_p()
        result = _functions().moepress_store_hold(
            self.number, layer, ids.ctypes.data, len(ids), byref(held)
        )
        if result == READ_FAILED:
            raise self.failure()
        _check(result)
        try:
            yield
        finally:
            _functions().moepress_store_release(held)

    def at_hand(self, layer: int) -> Tensor:
        """[E] bool: which experts of a layer are in memory or being read.

        Raises:
            InputError: this process is a fork of the one that opened the store.
        """
        experts = int(self._first[layer + 1] - self._first[layer])
        found = torch.empty(experts, dtype=torch.bool, device="cpu")
        _check(_functions().moepress_store_at_hand(self.number, layer, found.data_ptr()))
        return found

    def warm(self, experts: Iterable[tuple[int, int]]) -> None:
        """Begin to read experts, each (layer, expert), until the budget is full."""
        for layer, expert in experts:
            one = c_int64(expert)
            _check(_functions().moepress_store_read_ahead(self.number, layer, addressof(one), 1))

    def fill(self) -> None:
        """Read all experts, and have the system keep them in memory.

        Raises:
            InputError: the system does not allow so much locked memory, or the budget is too small.
            CheckpointError: an expert cannot be read.
        """
        error = _functions().moepress_store_lock(self.number)
        if error:
            raise InputError(
                f"Cannot lock {size_text(self.nbytes)} of memory: {os.strerror(error)}. Raise "
                "the limit (`ulimit -l`, or LimitMEMLOCK of a service), or give a size in place of "
                "'all'."
            )
        for layer in range(len(self._first) - 1):
            with self.hold(layer, range(int(self._first[layer + 1] - self._first[layer]))):
                pass

    def counts(self) -> StoreCounts:
        """What the store did since it was opened."""
        found = _Counts()
        _functions().moepress_store_counts(self.number, byref(found))
        return StoreCounts(*(getattr(found, name) for name, *_ in _Counts._fields_))

    def failure(self) -> CheckpointError:
        """What to raise after a read has failed."""
        found = _Failure()
        _functions().moepress_store_failure(self.number, byref(found))
        path = self._paths.get(found.fd)
        why = "it is shorter than it was" if found.error < 0 else os.strerror(found.error)
        return CheckpointError(
            f"An expert cannot be read from {path}: {why}. Nothing was computed with it. Check the "
            "drive, or copy the folder again."
        )

    def close(self) -> None:
        """End the threads and free the memory. Nothing may use the store after that."""
        if self._close.alive:  # else the number may be that of another store by now
            OPEN.pop(self.number, None)
            self._close()

    def _open(self, paths: Iterable[Path], direct: bool) -> dict[Path, int]:
        opened = {}
        for path in sorted(paths):
            try:
                fd = open_file(path, direct)
            except OSError as error:
                raise FileError(f"{path} cannot be opened: {error.strerror}.") from error
            self._paths[fd] = path
            opened[path] = fd
        return opened

    def _check(self, flat: Sequence[Place], opened: dict[Path, int]) -> None:
        sizes = {path: os.fstat(fd).st_size for path, fd in opened.items()}
        for place in flat:
            if place.nbytes and place.offset + place.nbytes > sizes[place.path]:
                raise FileError(
                    f"{place.path} has {sizes[place.path]:,} bytes, and an expert reaches to byte "
                    f"{place.offset + place.nbytes:,}. The file is truncated: copy it again."
                )
        pairs = zip(flat[::2], flat[1::2], strict=True)
        largest = max((pages(one) + pages(other) for one, other in pairs), default=0)
        check_largest(self.budget, largest)


def check_largest(budget: int, largest: int) -> None:
    """Raise InputError if a store cannot hold the largest expert. Both in bytes."""
    if largest > budget:
        raise InputError(
            f"There are {size_text(budget)} for experts, and the largest takes "
            f"{size_text(largest)}. Give more memory, at least {largest - budget:,} bytes."
        )


def _ranges(flat: Sequence[Place], opened: dict[Path, int]) -> Ints:
    """[M, 4] int64, MoepressRange: each place has the file's remainder modulo PAGE."""
    ranges = np.zeros((len(flat), 4), dtype=np.int64)
    end = 0
    for row, place in zip(ranges, flat, strict=True):
        if place.nbytes:
            page = page_of(place.nbytes)
            first = -(-end // page) * page
            row[:] = opened[place.path], place.offset, place.nbytes, first + place.offset % PAGE
            end = first + pages(place)
    return ranges


def open_file(path: Path, direct: bool) -> int:
    """A file descriptor whose reads leave the page cache alone, where the system can."""
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError:
        if not flag:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # not on this file system


def _close(number: int, paths: dict[int, Path]) -> None:
    _functions().moepress_store_close(number)
    _close_files(paths)


def _close_files(paths: dict[int, Path]) -> None:
    for fd in paths:
        os.close(fd)
    paths.clear()


def _check(result: int) -> None:
    if result:
        raise InputError(f"Experts on disk: {RESULTS.get(result, f'error {result}')}.")


@lru_cache(maxsize=1)
def _functions() -> ctypes.CDLL:
    """The library with the signatures of the store's functions."""
    found = library()
    for name, arguments, result in (
        ("open", (c_void_p, c_void_p, c_int64, c_void_p, c_double, c_int64, c_int32,
                  POINTER(c_void_p)), c_int32),
        ("close", (c_void_p,), None),
        ("region", (c_void_p, POINTER(c_int64)), c_void_p),
        ("at_hand", (c_void_p, c_int64, c_void_p), c_int32),
        ("read_ahead", (c_void_p, c_int64, c_void_p, c_int64), c_int32),
        ("hold", (c_void_p, c_int64, c_void_p, c_int64, POINTER(c_void_p)), c_int32),
        ("release", (c_void_p,), None),
        ("lock", (c_void_p,), c_int32),
        ("counts", (c_void_p, POINTER(_Counts)), None),
        ("failure", (c_void_p, POINTER(_Failure)), None),
    ):  # fmt: skip
        function = getattr(found, f"moepress_store_{name}")
        function.argtypes, function.restype = arguments, result
    return found
