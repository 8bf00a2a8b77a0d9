"""Drawn errors of a visit, in the emulator, against the plain operations of rounding/noise.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moepress.kernels.cuda import drawn
from moepress.rounding import noise


def arrays(columns: int, widths: int, rows: int = 24) -> tuple[Tensor, ...]:
    """Target, received feedback, residual, errors and noise."""
    generator = torch.Generator().manual_seed(columns + widths)
    target, z = torch.randn(2, rows, columns, generator=generator)
    received = torch.randn(rows, widths, columns, generator=generator)
    errors = torch.linspace(0.02, 0.3, widths)
    return target, received, torch.full_like(received, 7.0), errors, z


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [4, 96, 1024, 2500])
@pytest.mark.parametrize("widths", [1, 3])
def test_a_visit(columns: int, widths: int) -> None:
    """Also of fewer than eight rows, and no other row is touched."""
    given = arrays(columns, widths)
    expected = tuple(x.clone() for x in given)
    visit, plainly = drawn.drawing(*given), noise.plain_drawing(*expected)
    for start, stop in ((8, 16), (16, 20)):
        visit(start, stop)
        plainly(start, stop)
    for found, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
    assert given[2][:8].eq(7).all() and given[2][20:].eq(7).all()
    assert given[2][8:20].ne(7).all()


def test_columns_that_the_kernels_do_not_take() -> None:
    assert drawn.takes(torch.empty(8, 12)) and not drawn.takes(torch.empty(8, 13))
