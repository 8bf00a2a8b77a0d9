"""What `self_test` compares of compression: the path search, rotations, values, drawn errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moepress.format.codec import TRELLIS_BITS
from moepress.kernels import trellis
from moepress.rounding import noise, rotation
from moepress.rounding.methods import viterbi
from moepress.rounding.methods.trellis import path_values

COLUMNS = (96, 256, 2816)  # of rotated rows: runs of 32 and of 256, one and several
BRANCHES = (192, 40)  # rows, columns
VISITED = ((96, 1), (1100, 3), (26, 2))  # rows of a matrix, widths; 26: no kernel takes it
SUMS = 1e-5  # what the mean of squares in another order changes


class Call(NamedTuple):
    """A function, what it is given on the CPU, and what plain PyTorch finds there."""

    label: str
    op: Callable[..., Any]
    given: Sequence[Any]
    oracle: Callable[[], Any]
    tolerance: float = 0.0  # of a row; 0: equal


def searches(generator: torch.Generator) -> Iterator[Call]:
    """The best paths, which are codes, and so the same everywhere."""
    target = torch.randn(8, 64, generator=generator) * 300
    for width in TRELLIS_BITS:
        plain = partial(viterbi.search_plainly, target, width)
        yield Call(f"{width} bits", viterbi.search, [target, width], plain)


def rotations(generator: torch.Generator) -> Iterator[Call]:
    """Rows forth, and in float32 back: the same floats everywhere."""
    for columns in COLUMNS:
        rows = torch.randn(30, columns, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = rows.to(dtype)
            label = f"{columns} columns, {dtype}"
            yield Call(label, rotation.rotate, [x], partial(trellis.rotate, x))
        back = partial(trellis.rotate_back, rows)
        yield Call(f"{columns} columns, back", rotation.rotate_back, [rows], back)


def values(generator: torch.Generator) -> Iterator[Call]:
    """The values of codes, which are integers."""
    rows, columns = BRANCHES
    for bits in TRELLIS_BITS:
        steps = [
            torch.randint(
                1 << width, (rows, columns // 4, 2), dtype=torch.uint8, generator=generator
            )
            for width in trellis.branch_bits(bits)
        ]
        branches = torch.stack(steps, 2).view(rows, columns)
        plain = partial(trellis.code_matrix, branches, bits)
        yield Call(f"{bits} bits", path_values, [branches, bits], plain)


def drawn_errors(generator: torch.Generator) -> Iterator[Call]:
    """Two visits of drawn errors."""
    for rows, widths in VISITED:
        target, z = torch.randn(2, 24, rows, generator=generator)
        received = torch.randn(24, widths, rows, generator=generator)
        given = [target, received, torch.linspace(0.02, 0.3, widths), z]
        plain = partial(_visited, noise.plain_drawing, *given)
        op = partial(_visited, noise.drawing)
        yield Call(f"{rows} rows, {widths} widths", op, given, plain, SUMS)


def _visited(
    make: Callable[..., Callable[[int, int], None]],
    target: Tensor,
    received: Tensor,
    errors: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """Errors and what is left after feedback, of columns 8 .. 19; other columns stay."""
    errors_after, left = received.clone(), torch.zeros_like(received)
    visit = make(target, errors_after, left, errors, z)
    for start, stop in ((8, 16), (16, 20)):
        visit(start, stop)
    return errors_after, left


CALLS: dict[str, Callable[[torch.Generator], Iterator[Call]]] = {
    "path search": searches,
    "rotation": rotations,
    "values of paths": values,
    "drawn errors": drawn_errors,
}
