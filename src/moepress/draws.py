"""Tokens drawn from a model's predictions: the same ones on every device, but for rounding.

Each kind of device has random numbers of its own, so the numbers are drawn on the CPU. And devices
round differently, by 1 % of a probability in bfloat16. That should change 1 % of the tokens. But
where one number u picks the first token at which the sum of probabilities exceeds u, all errors
before a token move its boundaries, and an eighth of the tokens changes (docs/log.md#same-draws). So
a token is drawn with a number for each token v of the vocabulary, as

    argmax over v of  log p_v + G_v        G_v = -log E_v,  E_v = -log(1 - x_v),  x_v in (0, 1)

which has the probabilities p (the Gumbel-max trick, arXiv:1411.0030). Two devices whose p differ by
a total variation of d draw another token with a probability of at most 2 d / (1 + d), whatever the
vocabulary (arXiv:1612.01041). Each G_v meets one p_v only, so float32 is enough.

Numbers for all positions and tokens would be 10^10. So there are two rows, A and B, of a few
million random integers, each position n has a start in both, and

    x_v  =  (A[a_n + v] xor B[b_n + v] + 1/2) / 2^31

Those of one position are independent, because no number of A is in two of them. So are those of two
positions together if a_n - b_n differs: going from one position's pairs of numbers to the other's
and back moves along the rows, and never returns to where it began.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.errors import NumericalError

STARTS = 1 << 22  # in each row
BITS = 31  # of an integer


@dataclass(frozen=True)
class Noise:
    """Numbers to draw one token at each of some positions."""

    rows: Tensor  # [2, STARTS + V] int32, not negative, on the device of the predictions
    starts: Tensor  # [..., 2] int64 of each position, below STARTS; on the CPU

    def at(self, starts: Tensor) -> Tensor:
        """G [N, V] float32 of positions, from their starts [N, 2]."""
        vocabulary = self.rows.shape[1] - STARTS
        a, b = starts.to(self.rows.device).unbind(-1)
        first, second = self.rows.unfold(1, vocabulary, 1)  # [STARTS + 1, V] each, views
        x: Tensor = first[a].bitwise_xor_(second[b]).float().add_(0.5).mul_(2.0**-BITS)
        x.clamp_(max=1 - 2.0**-24)  # the float32 below 1
        return x.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    shape: tuple[int, ...], vocabulary: int, seed: int, device: torch.device | None = None
) -> Noise:
    """Noise for positions of any shape. Its integers depend on shape, vocabulary and seed alone.

    Args:
        device: where the rows are kept; None: the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(STARTS, (*shape, 2), generator=generator)
    size = 2, STARTS + vocabulary
    rows = torch.randint(1 << BITS, size, dtype=torch.int32, generator=generator)
    return Noise(rows.to(device), starts)


def drawn_tokens(log_probabilities: Tensor, noise: Tensor) -> Tensor:
    """Tokens [N] int64 drawn from predictions. None has the probability 0.

    Args:
        log_probabilities: [N, V] float32; each row up to a constant.
        noise: [N, V] float32, of `Noise.at`.

    Raises:
        NumericalError: a row holds NaN or infinity, or no token is possible.
    """
    best, tokens = (log_probabilities + noise).max(-1)
    if not bool(best.isfinite().all()):
        raise NumericalError(
            "The model gives NaN or infinity where it should predict the next token. Expected "
            "finite numbers: a float16 model may overflow; try a bfloat16 one."
        )
    return tokens
