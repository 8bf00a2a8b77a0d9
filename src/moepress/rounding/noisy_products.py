"""Products of tokens with a rounded matrix, drawn without the matrix.

noise.py draws the error E of every weight, and fits the scale of every row. But a cost only needs
what E does to the tokens. With V_d = I + (1 - d) (V - I), what noise.py visits column by column is

    E = (d W + s z) V_d^-1          s [K]: deviation of the noise of each column, z ~ N(0, 1)

so that a token x gets from row n

    E_n x = d W_n p + q_n,   p = V_d^-1 x,   q_n ~ N(0, sum_k s_k^2 p_k^2), independent for each n.

The mean of the products is that of the original matrix with other inputs, and the noise is a number
for each output. Sums over rows and over tokens have the expectation that drawn weights give them,
for which noise of several tokens may be the same. It takes T K^2 operations for each width in place
of N K^2 and more, no array of N K numbers, and T N random numbers or fewer in place of N K.

s and the scale hardly differ from row to row: they are measured on `ROWS` rows with drawn errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.kernels.trellis import TILE_COLUMNS
from moepress.rounding.factor import Factor, block_feedback
from moepress.rounding.noise import LEAST_SCALE, drawn_for_widths, drawn_rows
from moepress.rounding.rotation import rotate, rotate_back
from moepress.rounding.sweep import products_dtype

ROWS = 512  # on which deviations and scales are measured
SHARED = 256  # tokens that follow each other have noise of their own


@dataclass(frozen=True, eq=False)
class NoisyProducts:
    """What takes tokens through a matrix with the errors of one width.

    Attributes:
        feedback: [K, K] float32, above its diagonal that of V_d.
        kept: what of an input stays, a number.
        shrunk: what of p is taken from it, a number.
        deviation: [K] float32, that of the noise of each column, for a row of variance 1.
    """

    feedback: Tensor
    kept: Tensor
    shrunk: Tensor
    deviation: Tensor

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [t, K] in the dtype of x that give the mean of the products with the original
        matrix, and the deviation [t] of the noise of a row of mean square 1.

        Args:
            x: [t, K], not rotated.
        """
        rotated = rotate(x.float())
        p = torch.linalg.solve_triangular(
            self.feedback.T, rotated, upper=False, left=False, unitriangular=True
        )
        deviation = (p.square() @ self.deviation.square()).sqrt()
        mean = rotated.mul_(self.kept).sub_(p.mul_(self.shrunk))
        return rotate_back(mean).to(x.dtype), deviation


def rows_of_sample(rows: int) -> int:
    """How many rows of a matrix are drawn."""
    return min(rows, ROWS)


def noisy_products(
    weight: Tensor,
    widths: Sequence[float],
    factor: Factor,
    noise: Tensor,
    larger: Tensor | None = None,
) -> Iterator[NoisyProducts]:
    """Products with the errors of trellis codes of each width.

    Args:
        weight: [N, K], any float dtype; not changed.
        factor: of the Hessian of the *rotated* inputs.
        noise: [K, `rows_of_sample`], what `noise.draw` returned.
        larger: a number that the errors are multiplied by, see held_out.py; None: 1.

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    count = rows_of_sample(len(weight))
    some = torch.arange(count, device=weight.device) * len(weight) // count
    sample = drawn_rows(weight[some], factor, products_dtype(weight))
    feedback = block_feedback(factor.dense())
    one = feedback.new_ones(())
    larger = one if larger is None else larger
    for error, (_, residual) in drawn_for_widths(sample, widths, len(weight), noise):
        # Of E[r^2] = d v, v the variance of the adjusted weights, noise has the part 1 - d.
        variance = residual.square().mean(1).view(-1, TILE_COLUMNS).mean(1)
        deviation = (variance * (1 - error)).sqrt().repeat_interleave(TILE_COLUMNS)
        scale, share = sample.mean_gain(residual)
        del residual
        share = share * larger
        kept = torch.lerp(one, scale, share).clamp(min=LEAST_SCALE)
        part = share * scale
        yield NoisyProducts(feedback * (1 - error), kept, part * error, part * deviation)


def add_noise(products: Tensor, deviation: Tensor, noise: Tensor) -> None:
    """Add the noise of tokens to their products, in place.

    Args:
        products: [t, N], any float dtype, of tokens that begin at a multiple of `SHARED`.
        deviation: [t], of `NoisyProducts.of`.
        noise: [`SHARED`, N] float32 random numbers, each row of the matrix times its root mean
            square.
    """
    for first in range(0, len(products), SHARED):
        some = slice(first, first + SHARED)
        own = deviation[some, None]
        products[some] += noise[: len(own)] * own
