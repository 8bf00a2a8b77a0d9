"""The emulator of CUDA: what it computes, and what it finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulate import Argument, EmulationError, needs_compiler, run

SAMPLES = Path(__file__).parent / "samples.cu"

pytestmark = needs_compiler


def sample(name: str, *args: Argument, blocks: int = 1, block: int = 256, shared: int = 0) -> None:
    run(SAMPLES, f"moepress_samples_{name}", (blocks, 1, 1), block, shared, args)


def test_barriers_and_shuffles() -> None:
    given = torch.randint(-99, 99, (50, 256), dtype=torch.int32)
    out = torch.empty(50, dtype=torch.int32)
    sample("sum", given, out, 50, blocks=60, shared=32)
    assert out.equal(given.sum(1, dtype=torch.int32))


def test_matrix_products_and_a_missing_wait() -> None:
    a = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    b = torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    d = torch.empty(16, 8, dtype=torch.int32)
    sample("product", a, b, d, 1, block=32, shared=768)
    assert d.equal(a.int() @ b.int().T)
    sample("product", a, b, d, 0, block=32, shared=768)
    assert not d.equal(a.int() @ b.int().T)


def test_what_is_found() -> None:
    x, y = torch.rand(32), torch.empty(32)
    sample("shift", x, y, 0, 2.0, block=32)
    assert y.equal(2 * x)
    with pytest.raises(EmulationError, match=r"outside of a tensor.*thread 3"):
        sample("shift", x, y, 1, 2.0, block=32)
    with pytest.raises(EmulationError, match="outside of the dynamic shared memory"):
        sample("sum", torch.zeros(256, dtype=torch.int32), y, 1)
    with pytest.raises(EmulationError, match=r"deadlock.* 32 threads finished, 32 wait"):
        sample("stuck", block=64)
    with pytest.raises(EmulationError, match="4 parameters, got 3"):
        sample("shift", x, y, 1)


def test_conversions() -> None:
    x = torch.randn(256) * 2.0 ** torch.arange(-30, 18).repeat(6)[:256]
    x[:4] = torch.tensor([torch.inf, -torch.inf, 65519.9, 0.0])
    half, bfloat = torch.empty(256, dtype=torch.float16), torch.empty(256, dtype=torch.bfloat16)
    back = torch.empty(256)
    sample("convert", x, half, bfloat, back)
    assert half.equal(x.half()) and bfloat.equal(x.bfloat16()) and back.equal(x.half().float())
