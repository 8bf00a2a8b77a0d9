"""Run kernels: load their cubins into torch's context, launch them on torch's current stream.

A launcher belongs to a device. Tests put one that emulates into `LAUNCHERS` for the type "cpu", so
that the functions of this folder run without a card.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from moepress.errors import MoepressError
from moepress.kernels.cuda import compiler

Argument = Tensor | int | float | None
Grid = tuple[int, int, int]
NUMBERS = (int, float)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in numbers.h

# Whether a kernel's blocks may come to the card while the kernel before it ends (compute capability
# 9.0 and later). They wait for it in `begin` of device.h. MOEPRESS_OVERLAP=0 turns it off, for
# tools that check kernels.
OVERLAP = os.environ.get("MOEPRESS_OVERLAP") != "0"
MOST_CONFIGS = 256  # grids of a kernel that are kept

SOURCES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.cu")))


@dataclass(frozen=True)
class Launcher:
    """Runs kernels on one device.

    Attributes:
        launch: (kernel, grid, threads of a block, bytes of dynamic shared memory, arguments). A
            Tensor passes its address, None a null pointer, an int an int64_t, a float a float.
        multiprocessors: of the device.
        prepare: compiles the programs of some kernels at the same time; at their first launch they
            would be compiled one after another.
    """

    launch: Callable[[str, Grid, int, int, Sequence[Argument]], None]
    multiprocessors: int
    prepare: Callable[[Iterable[str]], None] = lambda kernels: None


def launcher_for(device: torch.device) -> Launcher:
    """The launcher of a device, which has an index if it is a card."""
    return LAUNCHERS[device.type](device)


def missing(device: torch.device) -> str | None:
    """The reason why kernels cannot run on a device, or None if they can."""
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA cards, and this torch is for AMD's"
    try:
        compiler.architecture(torch.cuda.get_device_capability(device))
        _driver()
    except MoepressError as error:
        return str(error)
    return None


def is_aligned(x: Tensor) -> bool:
    """Whether x is contiguous and at an address for loads of 16 bytes."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0


def aligned(x: Tensor) -> Tensor:
    """x, or a copy that `is_aligned`."""
    x = x.contiguous()
    return x if is_aligned(x) else x.clone()


def strided(x: Tensor) -> tuple[Argument, ...]:
    """A kernel's arguments for x [a, b, c, d]: it and its strides but the last, which is 1."""
    return x, *x.stride()[:3]


def source_of(kernel: str) -> str:
    """The name of the .cu file of a kernel, which follows `moepress_` in the kernel's name."""
    return max((s for s in SOURCES if kernel.startswith(f"moepress_{s}")), key=len)


def defines_of(kernel: str) -> tuple[str, ...]:
    """The macros with which the file of a kernel has only that kernel, if its name ends in _g_p.

    Compiling the kernels of all group sizes and planes at once would take six times as long.
    """
    found = re.search(r"_g(\d+)_p(\d+)$", kernel)
    return (f"MOEPRESS_GROUP={found[1]}", f"MOEPRESS_PLANES={found[2]}") if found else ()


@lru_cache(maxsize=64)
def _card(device: torch.device) -> Launcher:
    index = torch.cuda.current_device() if device.index is None else device.index
    functions: dict[str, _Function] = {}

    def launch(
        kernel: str,
        grid: Grid,
        threads: int,
        shared: int,
        args: Sequence[Argument],
    ) -> None:
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                launch(kernel, grid, threads, shared, args)
            return
        function = functions.get(kernel)
        if function is None:
            function = functions[kernel] = _Function(kernel, index)
        function(grid, threads, shared, args)

    def prepare(kernels: Iterable[str]) -> None:
        programs = {(source_of(kernel), defines_of(kernel)) for kernel in kernels}
        compiler.compile_all(programs, torch.cuda.get_device_capability(index))

    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    return Launcher(launch, multiprocessors, prepare)


class _Function:
    """A kernel that is loaded into the context of a card."""

    def __init__(self, kernel: str, index: int) -> None:
        self.kernel = kernel
        self.index = index
        self.driver = driver = _driver()
        self.success = driver.CUresult.CUDA_SUCCESS
        module = _module(source_of(kernel), defines_of(kernel), index)
        self.handle = _checked(kernel, driver.cuModuleGetFunction(module, kernel.encode()))
        attributes = driver.CUfunction_attribute
        static = _checked(
            kernel,
            driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self.handle),
        )
        optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        device = _checked(kernel, driver.cuDeviceGet(index))
        # Bytes of dynamic shared memory. CUDA gives more than 48 KB only where it is asked to.
        self.most = _checked(kernel, driver.cuDeviceGetAttribute(optin, device)) - static
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(kernel, driver.cuFuncSetAttribute(self.handle, dynamic, self.most))
        self.pool: list[_Arguments] = []
        self.configs: dict[tuple[Grid, int, int, int, bool], Any] = {}

    def __call__(self, grid: Grid, threads: int, shared: int, args: Sequence[Argument]) -> None:
        if shared > self.most:
            raise MoepressError(
                f"{self.kernel} needs {shared} bytes of shared memory, this card has {self.most}."
            )
        # Storage is taken out of the pool during a launch, in which other threads may run.
        try:
            arguments = self.pool.pop()
        except IndexError:
            arguments = _Arguments(args)
        words = [
            arg if type(arg) in NUMBERS else 0 if arg is None else arg.data_ptr()  # type: ignore[union-attr]
            for arg in args
        ]
        arguments.pack.pack_into(arguments.words, 0, *words)
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        config = self.configs.get((grid, threads, shared, stream, OVERLAP))
        if config is None:
            config = self._config(grid, threads, shared, stream)
        launch = config, self.handle, arguments.address, 0
        (error,) = self.driver.cuLaunchKernelEx(*launch)
        if error == self.driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread's first launch
            _enter(self.index)
            (error,) = self.driver.cuLaunchKernelEx(*launch)
        self.pool.append(arguments)
        if error != self.success:
            _checked(f"{self.kernel} cannot be launched", (error,))

    def _config(self, grid: Grid, threads: int, shared: int, stream: int) -> Any:
        driver = self.driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, stream
        if OVERLAP and torch.cuda.get_device_capability(self.index) >= (9, 0):
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        if len(self.configs) >= MOST_CONFIGS:
            self.configs.clear()
        self.configs[grid, threads, shared, stream, OVERLAP] = config
        return config


class _Arguments:
    """Storage of a kernel's arguments, 8 bytes each, and the array of their addresses."""

    def __init__(self, args: Sequence[Argument]) -> None:
        count = len(args)
        self.words = ctypes.create_string_buffer(8 * count)
        self.pack = Struct("=" + "".join("f4x" if isinstance(a, float) else "q" for a in args))
        first = ctypes.addressof(self.words)
        self.pointers = (ctypes.c_void_p * count)(*(first + 8 * i for i in range(count)))
        self.address = ctypes.addressof(self.pointers)


@lru_cache(maxsize=256)
def _module(name: str, defines: tuple[str, ...], index: int) -> Any:
    cubin = compiler.compiled(name, torch.cuda.get_device_capability(index), defines)
    _enter(index)
    try:
        return _checked(name, _driver().cuModuleLoadData(cubin))
    except torch.OutOfMemoryError:  # torch may keep all memory for reuse
        torch.cuda.empty_cache()
        return _checked(name, _driver().cuModuleLoadData(cubin))


def _enter(index: int) -> None:
    """Make the context that torch uses on a card current in this thread."""
    driver = _driver()
    device = _checked("context", driver.cuDeviceGet(index))
    context = _checked("context", driver.cuDevicePrimaryCtxRetain(device))
    _checked("context", driver.cuCtxSetCurrent(context))


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The module cuda.bindings.driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MoepressError(
            f"cuda-bindings cannot be imported ({error}). Install it: pip install cuda-bindings"
        ) from error
    return driver


def _checked(name: str, result: tuple[Any, ...]) -> Any:
    """The value of a call of the driver.

    Raises:
        torch.OutOfMemoryError: the card has too little memory, as where torch finds that.
        MoepressError: another error.
    """
    error, *values = result
    results = _driver().CUresult
    if error == results.CUDA_ERROR_OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory: {name}: the driver answers {error.name}")
    if error != results.CUDA_SUCCESS:
        raise MoepressError(f"{name}: the driver answers {error.name}.")
    return values[0] if values else None


LAUNCHERS: dict[str, Callable[[torch.device], Launcher]] = {"cuda": _card}
