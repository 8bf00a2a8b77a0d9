"""Compiling with NVRTC, where it is installed; what is said where it is not."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.errors import MoepressError
from moepress.kernels import backends
from moepress.kernels.cuda import compiler, launch
from tests.kernels.cuda import check_compile

MISSING = compiler.missing()
needs_nvrtc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path))
    return tmp_path


@needs_nvrtc
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])  # check_compile.py takes all of them
def test_every_source_compiles(capability: tuple[int, int], cache: Path) -> None:
    for name in launch.SOURCES:
        variant = check_compile.variant_of(name)
        assert compiler.compiled(name, capability, variant)[:4] == b"\x7fELF"
    assert len(list(cache.glob("*.cubin"))) == len(launch.SOURCES)


def test_every_kernel_waits_for_the_one_before_it() -> None:
    for path in (*compiler.HERE.glob("*.cu"), *compiler.HERE.glob("*.cuh")):
        text = path.read_text()
        if path.name == "trellis_decode_several.cu":  # they wait where trellis_decode.cu's do
            assert (compiler.HERE / "trellis_decode.cuh").read_text().count("wait_for_codes(") == 2
            continue
        assert text.count("__global__") <= len(re.findall(r"\bbegin\(\);", text)), path.name


class Compiler:
    """Compiles, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> tuple[bytes, str]:
        self.count += 1
        return b"cubin", ""


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(compiler, "_nvrtc", lambda: (None, (13, 0)))
    monkeypatch.setattr(compiler, "architecture", lambda capability: "sm_80")
    monkeypatch.setattr(compiler, "_compile", made)
    return made


def test_a_user_without_a_home_compiles_each_time(
    compiles: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MOEPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.Path, "home", no_home)
    assert [compiler.compiled("values", (8, 0)) for _ in range(2)] == [b"cubin"] * 2
    assert compiles.count == 2


def test_a_full_disk_keeps_no_half_of_a_kernel(
    compiles: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError("No space left on device")

    with monkeypatch.context() as on_full_disk:
        on_full_disk.setattr(compiler.Path, "replace", full)
        assert compiler.compiled("values", (8, 0)) == b"cubin"
    assert not list(cache.iterdir())
    assert [compiler.compiled("values", (8, 0)) for _ in range(2)] == [b"cubin"] * 2
    assert compiles.count == 2 and len(list(cache.glob("values-sm_80-*.cubin"))) == 1


@needs_nvrtc
def test_registers_and_spills_are_read() -> None:
    found = check_compile.compiled("combine", (9, 0))
    names = ("linear", "experts", "experts_biased")
    assert {k.name for k in found} == {f"moepress_combine_{name}" for name in names}
    assert all(16 <= k.registers <= 255 and k.spilled == 0 for k in found)


def test_spills_of_functions_that_are_called_count() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'moepress_a' for 'sm_90a'
ptxas         .     56 bytes stack frame, 48 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
ptxas info    : Function properties for part_of_a
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'moepress_b' for 'sm_90a'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""
    assert check_compile.kernels_of(log) == [
        check_compile.Kernel("moepress_a", 80, 92),
        check_compile.Kernel("moepress_b", 30, 0),
    ]


@needs_nvrtc
def test_a_source_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.compiled("combine", (9, 0))
    monkeypatch.setattr(compiler, "_compile", None)
    assert compiler.compiled("combine", (9, 0)) == first
    assert compiler.architecture((9, 0)) == "sm_90a" and compiler.architecture((8, 7)) == "sm_87"


@needs_nvrtc
def test_errors_of_the_compiler_are_shown(tmp_path: Path, cache: Path) -> None:
    nvrtc, _ = compiler._nvrtc()
    with pytest.raises(MoepressError, match=r'(?s)refuses broken\.cu.*identifier "nothing"'):
        compiler._compile(nvrtc, "broken", "int f() { return nothing; }", {}, compiler.OPTIONS)
    with pytest.raises(MoepressError, match=r"need compute capability 8\.0, this card has 7\.5"):
        compiler.architecture((7, 5))
    with pytest.raises(MoepressError, match=r"does not compile for compute capability 99\.0"):
        compiler.architecture((99, 0))


@pytest.fixture
def without_bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = builtins.__import__

    def no_cuda(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_cuda)
    compiler._nvrtc.cache_clear()
    yield
    compiler._nvrtc.cache_clear()
    backends._choose.cache_clear()


@pytest.mark.usefixtures("without_bindings")
def test_the_reference_runs_where_bindings_are_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend = backends.backend_for(torch.device("cuda", 0))
    assert backend.name == "reference"
    assert "cuda:0 runs reference, not cuda: cuda-bindings cannot be imported" in caplog.text
    assert "pip install cuda-bindings" in caplog.text
