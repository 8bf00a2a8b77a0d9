"""Values of trellis codes, in the emulator, against kernels/trellis.py."""

from __future__ import annotations

import pytest
import torch

from moepress.format.codec import TRELLIS_BITS
from moepress.kernels import trellis
from moepress.kernels.cuda import values


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("shape", [(64, 8), (192, 40), (128, 1032)])
def test_equal_values(bits: float, shape: tuple[int, int]) -> None:
    """One slab, which is above itself; several; more tiles than a block has threads."""
    generator = torch.Generator().manual_seed(round(2 * bits))
    by_step = torch.empty(shape[0], shape[1] // 4, 2, 2, dtype=torch.uint8)
    for step, width in enumerate(trellis.branch_bits(bits)):
        some = by_step[:, :, step]
        some.copy_(torch.randint(1 << width, some.shape, generator=generator))
    branches = by_step.view(shape)
    assert torch.equal(values.code_matrix(branches, bits), trellis.code_matrix(branches, bits))


@pytest.mark.usefixtures("emulated")
def test_branches_at_an_odd_address() -> None:
    """The kernel reads eight at a time."""
    memory = torch.randint(4, (64 * 16 + 3,), dtype=torch.uint8)
    branches = memory[3:].view(64, 16)
    assert torch.equal(values.code_matrix(branches, 2), trellis.code_matrix(branches, 2))


@pytest.mark.usefixtures("emulated")
def test_no_columns() -> None:
    branches = torch.empty(64, 0, dtype=torch.uint8)
    assert values.code_matrix(branches, 2).shape == (64, 0)
