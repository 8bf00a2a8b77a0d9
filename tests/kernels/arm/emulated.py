"""The CPU library of another architecture in place of this machine's: calls go to driver.cpp."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moepress.kernels import cpu
from moepress.kernels.cpu import interface


class Addresses:
    """What lies at the addresses that `moepress.kernels.cpu` passes to the library."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # of tensors, in bytes, with what lies behind them
        self.structures: dict[int, ctypes.Structure] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the address of every tensor and structure that is asked for it."""
        data_ptr = torch.Tensor.data_ptr

        def of_tensor(tensor: torch.Tensor) -> int:
            at = data_ptr(tensor)
            # A view has strides: it may reach to the end of its storage.
            self.sizes[at] = tensor.untyped_storage().nbytes() - (
                tensor.storage_offset() * tensor.element_size()
            )
            return at

        def of_structure(structure: ctypes.Structure) -> int:
            at = ctypes.addressof(structure)
            self.structures[at] = structure
            return at

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "data_ptr", of_tensor)
            patch.setattr(cpu, "addressof", of_structure, raising=False)
            yield


class EmulatedLibrary:
    """The functions of moepress.h, run by an emulator with a CPU of the given name.

    A context manager: its end is the emulator's.
    """

    def __init__(self, command: tuple[str, ...], addresses: Addresses) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._addresses = addresses

    def __enter__(self) -> EmulatedLibrary:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(timeout=10) == 0
        self._process.stdout.close()

    def __getattr__(self, name: str) -> Callable[..., object]:
        if not name.startswith("moepress_"):
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    def moepress_lend_team(self, _: object) -> None:
        """Threads of this process are of no use to another."""

    def moepress_instruction_sets(self) -> bytes:
        self._send("moepress_instruction_sets", b"", 0)
        (size,) = struct.unpack("<I", self._read(4))
        return self._read(size)

    def _call(self, name: str, arguments: tuple[object, ...]) -> int:
        types = interface.SIGNATURES.get(name, (ctypes.c_char_p,) * len(arguments))
        memory: list[tuple[int, int]] = []  # address, size
        pairs = zip(arguments, types, strict=True)
        self._send(name, b"".join(self._packed(a, t, memory) for a, t in pairs), len(arguments))
        (result,) = struct.unpack("<q", self._read(8))
        for address, size in memory:
            ctypes.memmove(address, self._read(size), size)
        return int(result)

    def _packed(self, value: object, kind: object, memory: list[tuple[int, int]]) -> bytes:
        """An argument as driver.cpp reads it. Appends memory that comes back with the result."""
        if isinstance(value, bytes):  # a text
            return struct.pack("<BQQ", 2, 0, len(value) + 1) + value + b"\0" + bytes(4)
        if kind is ctypes.c_float:
            return struct.pack("<Bf", 3, value)
        if kind is not ctypes.c_void_p:
            return struct.pack("<Bq", 0, value)
        if not value:
            return struct.pack("<BQQ", 1, 0, 0)
        assert isinstance(value, int)
        if value in self._addresses.structures:
            return self._packed_structure(value, memory)
        size = self._addresses.sizes[value]
        if size:
            memory.append((value, size))
        return struct.pack("<BQQ", 1, value, size) + ctypes.string_at(value, size)

    def _packed_structure(self, address: int, memory: list[tuple[int, int]]) -> bytes:
        structure = self._addresses.structures[address]
        size = ctypes.sizeof(structure)
        places = [
            (getattr(type(structure), name).offset, getattr(structure, name))
            for name, kind in structure._fields_
            if kind is ctypes.c_void_p
        ]
        parts = [
            struct.pack("<BQQ", 2, address, size),
            ctypes.string_at(address, size),
            struct.pack("<I", len(places)),
        ]
        for offset, value in places:
            parts.append(struct.pack("<I", offset))
            parts.append(self._packed(value, ctypes.c_void_p, memory))
        return b"".join(parts)

    def _send(self, name: str, arguments: bytes, count: int) -> None:
        assert self._process.stdin
        head = struct.pack("<I", len(name)) + name.encode() + struct.pack("<I", count)
        left = memoryview(head + arguments)
        while left:
            left = left[self._process.stdin.write(left) :]

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        data = bytearray()
        while len(data) < size:
            part = self._process.stdout.read(size - len(data))
            if not part:
                raise AssertionError(f"The emulator ended: {self._process.wait(timeout=10)}.")
            data += part
        return bytes(data)


@contextmanager
def emulated_library(folder: Path, emulator: tuple[str, ...]) -> Iterator[EmulatedLibrary]:
    """Let `moepress.kernels.cpu` call the library in `folder` (run.py) under an emulator."""
    addresses = Addresses()
    command = *emulator, str(folder / "driver"), str(folder / "libmoepress_cpu.so")
    with (
        EmulatedLibrary(command, addresses) as library,
        addresses.recorded(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(interface, "library", lambda: library)
        yield library
