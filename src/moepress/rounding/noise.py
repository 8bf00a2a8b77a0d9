"""Weights with the error that trellis rounding would leave, drawn instead of searched.

Rounding (methods/trellis.py) visits eight columns B at a time. It adds the feedback of the columns
before them, a_B = w_B + sum_(J<B) E_J V_JB, and searches the nearest codes; r_B = a_B - what_B is
left over, and E V = r. The search takes nearly all of the time, but of r only the statistics matter
to a cost. Rotated weights are nearly Gaussian, and a code with the best scale for Gaussian numbers
of variance v leaves r with

    E[r^2] = d v,   E[r what] = 0       =>      r = d a + sqrt(d (1 - d) v) z,   z ~ N(0, 1)

where d is the relative squared error of the code. The term d a says that rounding shrinks. Noise
alone, r = sqrt(d v) z, predicts half of the cost of gate and up at 1 bit (docs/log.md#noise-costs).
So the columns are visited as in rounding, with a draw in place of the search, and the scale of each
row is fitted as in rounding. The same z serves every width of a matrix.

The errors are made larger by what they are on tokens that the Hessian has not seen (held_out.py).

The fit (fit.py) needs one product with the weights, which all widths share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.format.codec import ROWS_PER_SLAB
from moepress.kernels import cpu
from moepress.kernels.cuda import drawn
from moepress.kernels.cuda.search import available
from moepress.kernels.trellis import TILE_COLUMNS, WEIGHTS_AT_ONCE, code_matrix, deviation
from moepress.pinned import pinned_empty
from moepress.rounding.factor import Factor
from moepress.rounding.fit import gain, inverse, mean_gain
from moepress.rounding.hessian import tensor_cores
from moepress.rounding.methods.trellis import START, rotated_rows
from moepress.rounding.methods.viterbi import search
from moepress.rounding.rotation import rotate_back
from moepress.rounding.sweep import Feedback, Visit, products_dtype, sweep
from moepress.sending import sent

SAMPLE = 1 << 16  # Gaussian numbers on which the error of a code is measured: to about .6 %
DRAWING_THREADS = 6  # a card takes as long for an expert as one thread for 100 million numbers
LEAST_SCALE = 1e-3  # of a row's size
LONGEST = 2048  # rows; the error of a code does not change any more with longer paths


_ahead: dict[tuple[tuple[int, ...], int, str], Future[Tensor]] = {}  # begun, not asked for yet


def draw(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """[K, N] float32 standard Gaussian numbers that depend on the arguments alone.

    They are drawn on the CPU, so that they are the same for every device.

    Args:
        shape: N, K of the matrix.
        name: of the matrix, different for every matrix of a model.
    """
    key = (tuple(shape), seed, name)
    ahead = _ahead.pop(key, None)
    return _draw(*key) if ahead is None else ahead.result()


def draw_ahead(shape: Sequence[int], seed: int, name: str) -> None:
    """Begin a `draw` for a card that will be asked for soon, on another thread."""
    key = (tuple(shape), seed, name)
    if key not in _ahead:
        _ahead[key] = _threads().submit(_draw, *key, for_card=True)


def forget_draws() -> None:
    """Let go of what `draw_ahead` began and nobody asked for."""
    for future in _ahead.values():
        future.cancel()
    _ahead.clear()


def _draw(shape: tuple[int, ...], seed: int, name: str, for_card: bool = False) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    numbers = None
    if for_card:  # it copies pinned memory several times faster
        numbers = pinned_empty(tuple(reversed(shape)), torch.float32)
    return torch.randn(*reversed(shape), generator=generator, out=numbers)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(DRAWING_THREADS, "moepress-draw")


def noisy_weights(
    weight: Tensor,
    widths: Sequence[float],
    factor: Factor,
    noise: Tensor,
    rows_of_code: int | None = None,
    larger: Tensor | None = None,
) -> Iterator[Tensor]:
    """A matrix with the error of trellis codes of each width, [N, K] in the dtype of `weight`.

    Args:
        weight: [N, K], any float dtype; not changed.
        factor: of the Hessian of the *rotated* inputs.
        noise: [K, N], what `draw` returned.
        rows_of_code: of the matrix that would be rounded, if `weight` has sums of its rows
            (costs/sketch.py); None: N.
        larger: a number that the errors are multiplied by, see held_out.py; None: 1.

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    count = len(weight) if rows_of_code is None else rows_of_code
    rows = drawn_rows(weight, factor, products_dtype(weight))
    for _, (change, residual) in drawn_for_widths(rows, widths, count, noise):
        scale = rows.size * rows.gain(residual)
        del residual
        if larger is not None:
            scale = _enlarge(change, scale, rows.size, larger)
        noisy = _scaled_rows(rows.target, change, scale, weight.dtype)
        del change  # before the next errors are drawn
        yield noisy
        del noisy


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """Rows of a matrix that get drawn errors.

    Attributes:
        target: [K, N] float32, rotated, every row of variance 1.
        size: [N] float32, the root mean square of each row.
        factor: of the Hessian of the rotated inputs.
        feedback: V.
        weighted: the products of target and factor.
    """

    target: Tensor
    size: Tensor
    factor: Factor
    feedback: Feedback
    weighted: Sequence[Tensor]

    def gain(self, residual: Tensor) -> Tensor:
        """[N], the scale that fits each row best, in units of its size; see `fit.gain`."""
        return gain(self.weighted, residual, self.factor)

    def mean_gain(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `fit.mean_gain`."""
        return mean_gain(self.weighted, residual, self.factor, self.size)


def drawn_rows(weight: Tensor, factor: Factor, dtype: torch.dtype) -> DrawnRows:
    """What of weights [N, K] all widths share.

    Args:
        dtype: of large products (sweep.py).

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    rows = rotated_rows(weight)
    size = rows.square().mean(1).sqrt()
    target = torch.empty(rows.T.shape, dtype=torch.float32, device=rows.device)
    torch.mul(rows.T, inverse(size), out=target)
    del rows
    weighted = list(factor.products(target, dtype))
    return DrawnRows(target, size, factor, factor.by_block(dtype), weighted)


def _enlarge(drawn: Tensor, scale: Tensor, size: Tensor, larger: Tensor) -> Tensor:
    """Multiply the errors of scale * (target - drawn), as a size * target; the new scale [N].

    Args:
        drawn: [K, N]; changed in place.
        scale, size: [N].
    """
    new = torch.lerp(size, scale, larger).clamp_(min=LEAST_SCALE * size)
    drawn *= larger * scale * inverse(new)
    return new


def _scaled_rows(target: Tensor, drawn: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`plain_rows`, compiled where that is possible."""
    on_cpu = target.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    compiled = on_cpu and cpu.missing() is None
    return (cpu.trellis_rows if compiled else plain_rows)(target, drawn, scale, dtype)


def plain_rows(target: Tensor, drawn: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows scale * (target - drawn), rotated back, [N, K]; some rows at a time.

    Args:
        target, drawn: [K, N].
        scale: [N].
    """
    columns, count = target.shape
    rows = torch.empty(count, columns, dtype=dtype, device=target.device)
    step = max(1, WEIGHTS_AT_ONCE // columns)
    for first in range(0, count, step):
        some = slice(first, first + step)
        difference = (target[:, some] - drawn[:, some]).T * scale[some, None]
        rows[some] = rotate_back(difference)
    return rows


def drawn_for_widths(
    rows: DrawnRows, widths: Sequence[float], count: int, noise: Tensor
) -> Iterator[tuple[float, tuple[Tensor, Tensor]]]:
    """For each width the error d of its code, and `drawn_errors`; on a card all in one visit.

    Args:
        count: rows of the matrix that would be rounded.
        noise: [K, N].
    """
    target, feedback = rows.target, rows.feedback
    noise = noise.to(target.device, non_blocking=noise.is_pinned())
    errors = [code_error(bits, count, target.device) for bits in widths]
    if target.device.type == "cpu":
        for error in errors:
            yield error, drawn_errors(target, feedback, error, noise)
        return
    buffer = target.new_zeros(len(target), len(errors), target.shape[1])  # [K, W, N]
    residual = torch.empty_like(buffer)
    given = target, buffer, residual, sent(torch.tensor(errors), target.device), noise
    with tensor_cores(target.device):
        sweep(buffer.flatten(1), feedback, 0, len(target), TILE_COLUMNS, drawing(*given))
    yield from zip(errors, zip(buffer.unbind(1), residual.unbind(1), strict=True), strict=True)


def drawing(
    target: Tensor, buffer: Tensor, residual: Tensor, errors: Tensor, noise: Tensor
) -> Visit:
    """What visits columns for all widths at once (kernels/cuda/drawn.py has the arguments)."""
    by_kernels = drawn.takes(target) and available(target.device)
    make = drawn.drawing if by_kernels else plain_drawing
    return make(target, buffer, residual, errors, noise)


def plain_drawing(
    target: Tensor, buffer: Tensor, residual: Tensor, errors: Tensor, noise: Tensor
) -> Visit:
    """`drawing` in PyTorch operations."""
    each = errors[:, None]
    spread = (each * (1 - each)).sqrt()

    def visit(start: int, stop: int) -> None:
        received, left = buffer[start:stop], residual[start:stop]
        adjusted = target[start:stop, None] + received
        deviation = adjusted.square().mean((0, 2), keepdim=True).sqrt() * spread
        torch.addcmul(each * adjusted, deviation, noise[start:stop, None], out=left)
        torch.sub(left, received, out=received)

    return visit


def drawn_errors(
    target: Tensor, feedback: Feedback, error: float, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Errors E of the columns and what is left after feedback, r = E V, both [K, N].

    Args:
        target: [K, N] the rotated weights, rows of variance 1.
        feedback: V, of `Factor.by_block`.
        error: d, the relative squared error of the code.
        noise: [K, N] z.
    """
    buffer = torch.zeros_like(target)  # feedback until a block is visited, then its errors
    residual = torch.empty_like(target)

    def visit(start: int, stop: int) -> None:
        block, received = target[start:stop], buffer[start:stop]
        adjusted = block + received
        deviation = adjusted.square().mean().sqrt() * (error * (1 - error)) ** 0.5
        torch.add(error * adjusted, deviation * noise[start:stop], out=residual[start:stop])
        torch.sub(residual[start:stop], received, out=buffer[start:stop])

    sweep(buffer, feedback, 0, len(target), TILE_COLUMNS, visit)
    return buffer, residual


def code_error(bits: float, rows: int, device: torch.device | str = "cpu") -> float:
    """Relative squared error of a trellis code on Gaussian numbers, with the best scale.

    It is larger for few rows, because a tail-biting path must end where it starts, and smaller
    where a slab is not full.

    Args:
        rows: of the matrix.
        device: where the paths are searched; the result does not depend on it.
    """
    return _code_error(bits, min(rows, LONGEST), torch.device(device))


@lru_cache(maxsize=64)
def _code_error(bits: float, rows: int, device: torch.device) -> float:
    padding = -rows % ROWS_PER_SLAB
    blocks = SAMPLE // ((rows + padding) * TILE_COLUMNS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(blocks, TILE_COLUMNS, rows, generator=generator)
    scale = START[bits] / deviation(bits)
    padded = F.pad(x / scale, (0, padding)).to(device)
    branches = [search(block, bits).cpu() for block in padded]
    codes = code_matrix(torch.cat(branches).T.contiguous(), bits)[:rows].T.flatten().double()
    x = x.flatten().double()
    explained = (x @ codes).square() / ((x @ x) * (codes @ codes))
    return round(1 - explained.item(), 6)  # without the rounding of sums, which may vary
