"""Visit the columns of a matrix in order, with feedback of the errors of those before.

Order of work. One matrix product passes the errors of the left half of the columns on to the right
half. Each half is treated in the same way, down to a few columns that are visited together:

    sweep(left); buffer[right] += F[left, right]^T buffer[left]; sweep(right)

So nearly all operations are in large matrix products, whatever the size of the cache. The buffer is
stored columns first, [K, n]: row k holds the feedback to column k until that column is visited, and
its error afterwards.

F [K, K] is a matrix, or it is known by T tokens (`TokenFeedback`): F_JB = x_J^T y_B for columns J
before the run of B. Then the errors are kept as what they do to the tokens, a [T, n] (the outputs'
errors), and one run of columns after the other gets its feedback from these:

    a += x_run buffer[run]; buffer[next run] += y_(next run)^T a

That takes 4 T K n operations in place of K^2 n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

RUN = 256  # columns; the halves of wide matrices begin and end at multiples of it
# For fewer columns, products of 16-bit numbers save less time than their conversion takes.
COLUMNS_IN_16_BITS = 256

Visit = Callable[[int, int], None]
PassOn = Callable[[int, int, int], None]  # start, middle, stop: from the first half to the second


@dataclass(frozen=True)
class TokenFeedback:
    """Feedback that T tokens pass on, and inside of runs of `RUN` columns a matrix."""

    x: Tensor  # [T, K] float32 or bfloat16
    y: Tensor  # [T, K] in the dtype of x
    inner: Sequence[Tensor]  # of each run [RUN, RUN] float32; the last one may be smaller


Feedback = Tensor | TokenFeedback


def in_16_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products for drawn errors, corrections and gains are of bfloat16 numbers.

    So are those for the scales of experts. Weights are bfloat16 on CPUs that multiply such numbers
    faster (original/dtypes.py). It changes costs by .03 % at most, and another draw by .6 %
    (docs/log.md#rounding-on-a-cpu); of what a correction gains it takes .002 %
    (docs/log.md#few-tokens); it changes scales by .01 % at most (docs/log.md#cpu-profile). Feedback
    of real rounding stays in float32.

    Args:
        dtype: of the weights, or of the inputs.
    """
    return device.type == "cpu" and dtype == torch.bfloat16


def products_dtype(weight: Tensor) -> torch.dtype:
    """Of products with a factor of K columns for weights [N, K], where `in_16_bits` allows it."""
    narrow = in_16_bits(weight.dtype, weight.device) and weight.shape[1] > COLUMNS_IN_16_BITS
    return torch.bfloat16 if narrow else torch.float32


def sweep(
    buffer: Tensor, feedback: Feedback, start: int, stop: int, leaf: int, visit: Visit
) -> None:
    """Visit columns start .. stop in order, `leaf` at a time, with feedback between the visits.

    Before `visit` is called for column k, sum_j feedback[j, k] * buffer[j] over all columns j of
    start .. stop that were visited earlier has been added to buffer[k].

    Args:
        buffer: [K, n] float32; `visit` replaces feedback by errors in it.
        feedback: [K, K] float32, or known by tokens. If it is bfloat16, products for many columns
            are of bfloat16. Feedback known by tokens needs a start of 0 and a leaf that divides
            RUN.
        visit: called with the first column and the one after the last of each leaf.
    """
    sweep_together([(buffer, feedback)], start, stop, leaf, visit)


def sweep_together(
    matrices: Sequence[tuple[Tensor, Feedback]], start: int, stop: int, leaf: int, visit: Visit
) -> None:
    """`sweep` for matrices of equal K, each with its own buffer and feedback.

    A call of `visit` is for the same columns of all of them.
    """
    _halves([_passing(*matrix) for matrix in matrices], start, stop, leaf, visit)


def middle_of(start: int, stop: int, leaf: int) -> int:
    """Where the second half of columns start .. stop begins; `stop` if they are one leaf."""
    unit = RUN if stop - start > RUN and RUN % leaf == 0 else leaf
    units = -(-(stop - start) // unit)
    return start + unit * (units // 2) if units > 1 else stop


def runs(columns: int) -> list[slice]:
    """The runs of a matrix with K columns."""
    return slices(columns, RUN)


def slices(columns: int, size: int) -> list[slice]:
    """K columns, `size` at a time."""
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]


def _halves(passes: Sequence[PassOn], start: int, stop: int, leaf: int, visit: Visit) -> None:
    middle = middle_of(start, stop, leaf)
    if middle == stop:
        visit(start, stop)
        return
    _halves(passes, start, middle, leaf, visit)
    for pass_on in passes:
        pass_on(start, middle, stop)
    _halves(passes, middle, stop, leaf, visit)


def _passing(buffer: Tensor, feedback: Feedback) -> PassOn:
    if isinstance(feedback, TokenFeedback):
        return _TokenSweep(buffer, feedback).pass_on
    return partial(_pass_on, buffer, feedback)


def _pass_on(buffer: Tensor, feedback: Tensor, start: int, middle: int, stop: int) -> None:
    """Add feedback [K, K] of the errors of start .. middle to what middle .. stop received."""
    _add_product(buffer[middle:stop], feedback[start:middle, middle:stop].T, buffer[start:middle])


class _TokenSweep:
    """One sweep with feedback known by tokens."""

    def __init__(self, buffer: Tensor, feedback: TokenFeedback) -> None:
        self._buffer = buffer
        self._feedback = feedback
        shape = len(feedback.x), buffer.shape[1]
        self._outputs = torch.zeros(shape, dtype=buffer.dtype, device=buffer.device)

    def pass_on(self, start: int, middle: int, stop: int) -> None:
        run, place = divmod(start, RUN)
        if stop <= (run + 1) * RUN:
            inner, first = self._feedback.inner[run], start - place
            inside = inner[place : middle - first, middle - first : stop - first]
            _add_product(self._buffer[middle:stop], inside.T, self._buffer[start:middle])
            return
        # The middle lies between two runs. Each two neighbours are parted once, from left to right.
        left, right = slice(middle - RUN, middle), slice(middle, min(middle + RUN, stop))
        _add_product(self._outputs, self._feedback.x[:, left], self._buffer[left])
        _add_product(self._buffer[right], self._feedback.y[:, right].T, self._outputs)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [m, l] times right [l, n] to `to` [m, n] float32."""
    if left.dtype == to.dtype:
        to.addmm_(left, right)
    elif min(left.shape) < COLUMNS_IN_16_BITS:
        to.addmm_(left.to(to.dtype), right)
    else:
        to += left @ right.to(left.dtype)
