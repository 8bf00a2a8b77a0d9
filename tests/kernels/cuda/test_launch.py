"""What the launcher makes of a driver's answers. The driver is a stand-in: there is no card."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepress.cli.ending import described
from moepress.errors import MoepressError
from moepress.kernels.cuda import launch


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_LAUNCH_FAILED = 719


NAMES = SimpleNamespace(
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=2,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=3,
)
FULL, FINE = CUresult.CUDA_ERROR_OUT_OF_MEMORY, CUresult.CUDA_SUCCESS


class Driver:
    """Answers as it is told to, in turn; then all is well."""

    CUresult = CUresult
    CUfunction_attribute = CUdevice_attribute = NAMES
    CUlaunchConfig = SimpleNamespace

    def __init__(self, loads: list[CUresult], launches: list[CUresult]) -> None:
        self.answers = {"cuModuleLoadData": loads, "cuLaunchKernelEx": launches}

    def __getattr__(self, name: str) -> Any:
        given = self.answers.get(name, [])
        values = () if name == "cuLaunchKernelEx" else (1000,)
        return lambda *_: (given.pop(0) if given else FINE, *values)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How often torch was asked to let go of memory."""
    found: list[str] = []
    monkeypatch.setattr(launch.compiler, "compiled", lambda *_: b"cubin")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("cache"))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    launch._module.cache_clear()
    yield found
    launch._module.cache_clear()


def launched(
    monkeypatch: pytest.MonkeyPatch, loads: list[CUresult], launches: list[CUresult]
) -> None:
    driver = Driver(loads, launches)
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    function = launch._Function("moepress_values", 0)
    function((1, 1, 1), 128, 0, [torch.zeros(2), 3, None, 0.5])


def test_a_kernel_is_loaded_where_torch_keeps_all_memory(
    freed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, [FULL], [])
    assert freed == ["cache"]
    launched(monkeypatch, [], [CUresult.CUDA_ERROR_INVALID_CONTEXT])
    assert freed == ["cache"]


@pytest.mark.parametrize(("loads", "launches"), [([FULL, FULL], []), ([], [FULL])])
def test_a_full_card_is_torchs_error(
    freed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    loads: list[CUresult],
    launches: list[CUresult],
) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="values") as error:
        launched(monkeypatch, loads, launches)
    assert described(error.value)[0].startswith("Out of memory: CUDA out of memory")


def test_other_errors_name_the_kernel(freed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoepressError, match=r"moepress_values cannot be launched: .*_FAILED"):
        launched(monkeypatch, [], [CUresult.CUDA_ERROR_LAUNCH_FAILED])
    assert not freed


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    ],
)
def test_a_card_without_memory_is_no_defect(words: str) -> None:
    assert described(RuntimeError(words))[0].startswith("Out of memory: ")
