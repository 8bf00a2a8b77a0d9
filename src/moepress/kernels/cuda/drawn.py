"""Drawn errors of one visit on a card (drawn.cu), for all widths at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moepress.kernels.cuda.launch import launcher_for

THREADS = 256
COLUMNS = 4 * THREADS  # of a block


def takes(target: Tensor) -> bool:
    """Whether the kernels can visit a matrix [K, N] on a card on which kernels run."""
    return target.shape[1] % 4 == 0


def drawing(
    target: Tensor, received: Tensor, residual: Tensor, errors: Tensor, noise: Tensor
) -> Callable[[int, int], None]:
    """A function that visits columns start .. stop of a matrix, as noise.py describes it.

    Args:
        target: [K, N] float32 that the kernels `take`.
        received: [K, W, N] float32, feedback; a visit overwrites it with errors.
        residual: [K, W, N] float32; a visit writes what is left.
        errors: [W] float32, the relative squared error of each code.
        noise: [K, N] float32.
    """
    launcher = launcher_for(target.device)
    columns, widths = target.shape[1], len(errors)
    grid = -(-columns // COLUMNS), widths, 1
    partial = torch.empty(widths, grid[0], dtype=torch.float32, device=target.device)

    def visit(start: int, stop: int) -> None:
        given = target, received, start, stop - start, widths, columns, partial
        launcher.launch("moepress_drawn_energy", grid, THREADS, 4 * THREADS // 32, given)
        more = noise, errors, residual
        launcher.launch("moepress_drawn_errors", grid, THREADS, 0, (*given, *more))

    return visit
