"""The emulator of CUDA: what it computes, and what it finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulate import RACES, Argument, EmulationError, Guarded, needs_compiler, run

SAMPLES = Path(__file__).parent / "samples.cu"

pytestmark = needs_compiler


def sample(
    name: str,
    *args: Argument,
    blocks: int = 1,
    block: int = 256,
    shared: int = 0,
    races: bool = RACES,
) -> None:
    run(SAMPLES, f"moepress_samples_{name}", (blocks, 1, 1), block, shared, args, races)


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
    sample("product", a, b, d, 0, block=32, shared=768, races=False)
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


@pytest.mark.parametrize("length", [32, 0])
def test_a_tensor_without_elements_has_no_address(length: int) -> None:
    """As on a card, wherever the storage lies that it is a part of."""
    storage = torch.rand(length)
    copy = Guarded(storage)
    assert copy.at(storage[length:]) == 0
    copy.close()


@pytest.mark.parametrize("races", [False, True])
def test_a_load_of_16_bytes_at_another_address(races: bool) -> None:
    x, y = torch.rand(32), torch.empty(4)
    sample("wide", x, y, 4, block=32, races=races)
    assert y.equal(x[4:8])
    with pytest.raises(EmulationError, match="a misaligned access, in thread 0"):
        sample("wide", x, y, 6, block=32, races=races)


def test_conversions() -> None:
    x = torch.randn(256) * 2.0 ** torch.arange(-30, 18).repeat(6)[:256]
    x[:4] = torch.tensor([torch.inf, -torch.inf, 65519.9, 0.0])
    half, bfloat = torch.empty(256, dtype=torch.float16), torch.empty(256, dtype=torch.bfloat16)
    back = torch.empty(256)
    sample("convert", x, half, bfloat, back)
    assert half.equal(x.half()) and bfloat.equal(x.bfloat16()) and back.equal(x.half().float())


def ordered(name: str, *args: Argument, blocks: int = 1, block: int = 64, shared: int = 0) -> bool:
    """Whether a sample has no race."""
    try:
        sample(name, *args, blocks=blocks, block=block, shared=shared, races=True)
    except EmulationError as error:
        assert "are not ordered" in str(error) or "before begin" in str(error)
        return False
    return True


def test_races_in_shared_memory() -> None:
    out = torch.empty(64, dtype=torch.int32)

    def found(order: int, far: int = 0, block: int = 64) -> bool:
        return not ordered("neighbour", out[:block], order, far, block=block, shared=256)

    nothing, shuffle, warp, block = range(4)
    assert found(nothing) and found(shuffle) and found(warp) and not found(block)
    assert found(warp, far=1) and not found(block, far=1)
    assert found(shuffle, block=32) and not found(warp, block=32)
    assert out[:32].equal(torch.arange(1, 33, dtype=torch.int32) % 32)


def test_a_race_names_its_lines() -> None:
    out = torch.empty(64, dtype=torch.int32)
    said = r"at byte \d+ of 256: a \w+ of thread \d+ at samples.cu:\d+ and a \w+ at samples.cu"
    with pytest.raises(EmulationError, match=said):
        sample("neighbour", out, 0, 0, block=64, shared=256, races=True)


def test_races_of_copies() -> None:
    given, out = torch.tensor([1, 2, 3], dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    assert not ordered("ring", given, out, 0, block=32, shared=16)
    assert ordered("ring", given, out, 1, block=32, shared=16)
    assert out.equal(torch.full_like(out, 6))
    a, b = torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(8, 32, dtype=torch.int8)
    d = torch.empty(16, 8, dtype=torch.int32)
    assert not ordered("product", a, b, d, 0, block=32, shared=768)
    assert ordered("product", a, b, d, 1, block=32, shared=768)


def test_races_between_blocks() -> None:
    for order in range(4):
        numbers, counter = torch.empty(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        out = torch.empty(1, dtype=torch.int32)
        last = ordered("last", numbers, counter, out, order, blocks=5, block=32)
        assert last == (order == 3)
    assert out.item() == 10
    assert not ordered("begin", torch.empty(64, dtype=torch.int32), 0)
    assert ordered("begin", torch.empty(64, dtype=torch.int32), 1)


def test_races_of_warpgroup_products() -> None:
    out = torch.empty(128, dtype=torch.int32)
    for order in range(4):
        assert ordered("warpgroup", out, order, block=128, shared=16384) == (order == 3)
