"""Kernels for CPUs that this machine may not have, compiled as plain C++ (library.cpp): those for
AMX (tiles.h), and on CPUs with AVX2 those for AVX-VNNI (vnni.h).

On a machine with these the tests of every instruction set run the real instructions as well.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from moepress.format.codec import TRELLIS_BITS, Codec
from moepress.kernels import cpu, reference
from moepress.kernels.cpu import interface
from tests.kernels import test_cpu
from tests.kernels.test_kernels import CODECS
from tests.kernels.test_trellis_cpu import experts_call, product_in_integers, values_of
from tests.rounding.test_trellis import codec_of, random_packed

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "src/moepress/kernels/cpu"  # an installed package has no sources
UNITS = (
    "scalar", "scalar_matrix", "trellis", "trellis_fit", "trellis_pack", "trellis_rows",
    "trellis_values", "viterbi", "drop", "small", "route", "attention", "routing", "store",
    "threads", "dispatch",
)  # fmt: skip
COMPILER = shutil.which("g++") or shutil.which("c++")
OPTIONS = (
    "-std=gnu++17", "-O0", "-fPIC", "-shared", "-pthread", "-ffp-contract=off",
    "-fvisibility=hidden", "-Wno-psabi", '-DMOEPRESS_TILES="tiles.h"', f"-I{SOURCES}", f"-I{HERE}",
)  # fmt: skip

EMULATED = ("bytes", "amx", "vnni")  # by the number that library.cpp takes
HAS_AVX2 = cpu.missing() is None and "avx2" in cpu.instruction_sets()
AVX2 = ("-mavx2", "-mfma") if HAS_AVX2 else ()

pytestmark = pytest.mark.skipif(
    COMPILER is None or cpu.missing() is not None, reason="no C++ compiler or no library"
)


def library() -> Path:
    """The compiled library; kept in the folder for temporary files, by content."""
    files = [*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    key = hashlib.sha256(str((COMPILER, OPTIONS, AVX2, UNITS)).encode())
    for file in sorted(files):
        key.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"moepress-amx-{os.getuid()}-{key.hexdigest()[:20]}"
    path = folder / "libmoepress_cpu.so"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            units = [str(SOURCES / f"{name}.cpp") for name in UNITS] + [str(HERE / "library.cpp")]
            made = Path(new) / path.name
            subprocess.run([str(COMPILER), *OPTIONS, *AVX2, *units, "-o", str(made)], check=True)
            made.replace(path)
    return path


@pytest.fixture(params=EMULATED)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run moepress.kernels.cpu on the emulated library."""
    if request.param == "vnni" and not HAS_AVX2:
        pytest.skip("this CPU has no AVX2")
    path = library()
    ctypes.CDLL(str(path)).emulate(EMULATED.index(request.param))
    monkeypatch.setattr(cpu, "__path__", [str(path.parent)])
    interface.library.cache_clear()
    assert cpu.instruction_sets() == ("emulated",)
    yield request.param
    monkeypatch.undo()
    interface.library.cache_clear()


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("group, tokens", [(32, 8), (64, 9), (128, 17), (128, 37)])
def test_every_bit(emulated: str, bits: float, group: int, tokens: int) -> None:
    """Tails of 16 and of 32 tokens, one run of tokens and two; the largest codes."""
    rows, cols, codec = 130, 2 * group, codec_of(bits, group)
    packed = random_packed(rows, cols, codec)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1))
    x[5] = 0
    x[5, 3::group] = 1  # rotation spreads a single number: all codes are the largest
    together = cpu.linear(x, packed, None, rows, codec, 8)
    fused = emulated == "vnni"
    oracle = product_in_integers(x, packed, rows, codec, 8, values="bytes", fused=fused)
    assert torch.equal(together, oracle)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_scalar_codes(emulated: str, codec: Codec, bits: int) -> None:
    test_cpu.test_linear(emulated, codec, bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_experts(emulated: str, bits: int) -> None:
    call = experts_call(40, 64, 96, 32, bits=bits)
    values = partial(values_of, emulated, bits)
    y, oracle = cpu.experts(call), reference.experts(call, rounded=True, values_of=values)
    far = {8: 1e-2, 16: 1e-4}[bits]  # a sum before the second rounding may tip single codes
    torch.testing.assert_close(y, oracle, rtol=1e-3, atol=far * float(oracle.abs().max()))
