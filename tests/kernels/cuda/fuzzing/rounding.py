"""Random calls of what compression computes by kernels, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moepress.format.codec import TRELLIS_BITS
from moepress.kernels import trellis
from moepress.kernels.cuda import drawn, values
from moepress.rounding import noise
from moepress.rounding import rotation as rotations
from moepress.rounding.methods import viterbi
from tests.kernels.cuda.fuzzing.draw import Draw


def rotation(draw: Draw) -> None:
    """Equal floats."""
    columns = (1 << draw.integer("power", 0, 9)) * draw.one("odd", (1, 3, 7, 11))
    rows = [draw.random.randint(0, 9) for _ in range(draw.integer("dimensions", 0, 2))]
    x = draw.normal(*draw.note("rows", rows), columns) * draw.one("size", (1.0, 1e-4))
    given = draw.placed("x", x.to(draw.dtype()))
    assert torch.equal(rotations.rotate(given), trellis.rotate(given))
    back = draw.placed("weight", x)
    assert torch.equal(rotations.rotate_back(back), trellis.rotate_back(back))


def path_values(draw: Draw) -> None:
    """Equal integers."""
    bits = draw.one("bits", TRELLIS_BITS)
    slabs, columns = draw.integer("slabs", 1, 4), 8 * draw.integer("tiles", 1, 150)
    steps = [
        draw.integers(0, (1 << width) - 1, 64 * slabs, columns // 4, 2)
        for width in trellis.branch_bits(bits)
    ]
    branches = torch.stack(steps, 2).view(64 * slabs, columns).to(torch.uint8)
    given = draw.placed("branches", branches, unit=draw.random.choice((1, 8)))
    assert torch.equal(values.code_matrix(given, bits), trellis.code_matrix(branches, bits))


def drawn_errors(draw: Draw) -> None:
    rows, widths = draw.integer("rows", 1, 40), draw.integer("widths", 1, 7)
    columns = 4 * draw.integer("columns / 4", 1, draw.random.choice((9, 700)))
    target, z = (draw.normal(rows, columns) for _ in range(2))
    received = draw.normal(rows, widths, columns)
    given = target, received, torch.full_like(received, 7), draw.uniform(widths), z
    exact = tuple(x.clone() for x in given)
    assert drawn.takes(target)
    visits = drawn.drawing(*given), noise.plain_drawing(*exact)
    start = draw.integer("start", 0, rows - 1)
    stop = draw.integer("stop", start + 1, rows)
    for visit in visits:
        visit(start, stop)
    for found, wanted in zip(given, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=4e-6, atol=4e-6)


def search(draw: Draw) -> None:
    """Equal paths, through one matrix and through several at a time."""
    bits = draw.one("bits", TRELLIS_BITS)
    rows = 64 * draw.integer("slabs", 1, 3)
    target = draw.normal(8, rows) * 10 ** draw.one("size", (0, 2, 2, 3, 9))
    if draw.chance("whole numbers", 0.3):
        target = target.round()
    found = viterbi.search(draw.placed("target", target), bits)
    assert torch.equal(found, viterbi.search_plainly(target, bits))
    if draw.chance("several", 0.3):
        widths = draw.some("widths", TRELLIS_BITS, draw.integer("matrices", 1, 2))
        first = 8 * draw.integer("first / 8", 0, 1)
        given = [draw.normal(len(widths), 16, rows) * 90 for _ in range(2)]
        branches = torch.zeros(len(widths), 16, rows, dtype=torch.uint8)
        exact = [x.clone() for x in (*given, branches)]
        viterbi.round_together(*given, branches, widths, first)  # type: ignore[misc]
        columns = slice(first, first + 8)
        for number, width in enumerate(widths):
            viterbi.round_plainly(*(x[number, columns] for x in exact), width)
        assert torch.equal(branches, exact[2]) and torch.equal(given[1], exact[1])
        torch.testing.assert_close(given[0], exact[0], rtol=0, atol=1e-3)


CASES: dict[str, Callable[[Draw], None]] = {
    "rotation": rotation, "values": path_values, "drawn": drawn_errors, "search": search,
}  # fmt: skip
