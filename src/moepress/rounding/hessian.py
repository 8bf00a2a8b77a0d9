"""The Hessian of a linear layer's squared output error, and its LDL factorization.

Let Ŵ be the rounded weights W [N, K], E = W - Ŵ, and c_t the weight of token t with input
x_t. The squared error of the outputs is a quadratic form, the same for every row of E:

    sum_t c_t || E x_t ||^2 = trace(E H E^T),      H = sum_t c_t x_t x_t^T   [K, K]

With H = R D R^T, R unit *upper* triangular and D diagonal, it becomes a sum over columns:

    trace(E H E^T) = || E R D^(1/2) ||_F^2 = sum_k D_k || (E R)_k ||^2
    (E R)_k = E_k + sum_(j<k) E_j R_jk

so the errors of the columns j < k act on column k as if w_k were moved by sum_(j<k) E_j R_jk. GPTQ
needs only R and D (gptq.py), so the inverse of H is never formed. R comes from one Cholesky
factorization of H with its rows and columns in reverse order (J: the reversal, L lower triangular):

    J H J = L L^T   =>   H = (J L J)(J L J)^T = U U^T,  U upper;   R_jk = U_jk / U_kk,  D_k = U_kk^2
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moepress.errors import NumericalError
from moepress.rounding.factor import DenseFactor, column_slices
from moepress.sending import sent

TOKENS_PER_CHUNK = 4096  # bounds the float32 copy of the inputs
DAMPING_RETRIES = 4  # each with ten times the damping of the one before

logger = logging.getLogger(__name__)


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Inside the `with` statement, a card rounds factors of float32 matrix products to TF32.

    TF32 keeps 11 bits of a number, which takes an eighth of the time. It is for Hessians, whose
    inputs have 8 or 11 bits (a Hessian of rounded inputs stays positive semidefinite), and for
    scales, which are rounded to 8 bits. The feedback of errors is computed in float32: there,
    rounding would change codes.
    """
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_upper_products(upper: Tensor, x: Tensor, slices: Sequence[slice] | None = None) -> None:
    """Add x^T x of x [T, K] to a matrix [K, K], on and above the diagonal; some below is changed.

    Args:
        slices: those of `column_slices` of K that are summed; None: all.
    """
    for own in column_slices(x.shape[1]) if slices is None else slices:
        rest = slice(own.start, None)
        upper[own, rest].addmm_(x[:, own].T, x[:, rest])


@dataclass
class TokenWeights:
    """The weights c_t of tokens."""

    added: list[Tensor] = field(default_factory=list)

    def add(self, tokens: int, weight: Tensor | None) -> None:
        """Add the weights [T] of some tokens, on any device; None: 1 each."""
        self.added.append(torch.ones(tokens) if weight is None else weight)

    @property
    def all(self) -> Tensor:
        """[T] on the CPU, in the order in which they were added."""
        return torch.cat(self.added).cpu() if self.added else torch.empty(0)

    @property
    def tokens(self) -> float:
        """Effective number of tokens, (sum c_t)^2 / (sum c_t^2): T if all weights are equal."""
        weights = self.all.double()
        squared = weights.square().sum().item()
        return weights.sum().item() ** 2 / squared if squared else 0.0


class Hessian:
    """Accumulates H = sum_t c_t x_t x_t^T in float32. Holds one [K, K] matrix."""

    def __init__(self, features: int, device: torch.device | str) -> None:
        self.features = features
        self._weights = TokenWeights()
        self._upper: Tensor | None = torch.zeros(
            features, features, dtype=torch.float32, device=device
        )

    def add(
        self, x: Tensor, weight: Tensor | None = None, slices: Sequence[slice] | None = None
    ) -> None:
        """Add T tokens.

        Args:
            x: [T, K], any float dtype: the layer's inputs.
            weight: [T], at least 0: weight c_t of each token; None: 1.
            slices: those of `column_slices` that are summed; None: all.
        """
        upper = self._matrix()
        self._weights.add(len(x), weight)
        for start in range(0, len(x), TOKENS_PER_CHUNK):
            chunk = x[start : start + TOKENS_PER_CHUNK].detach().to(upper.device, torch.float32)
            if weight is not None:
                root = sent(weight[start : start + TOKENS_PER_CHUNK], chunk.device).float().sqrt()
                chunk = chunk * root[:, None]
            with tensor_cores(upper.device):
                add_upper_products(upper, chunk, slices)

    def rows(self, own: slice) -> Tensor:
        """The rows of a slice, not copied. What is below the diagonal is not used."""
        return self._matrix()[own]

    def copy(self) -> Hessian:
        """A copy, which can be factored while this one is still in use."""
        other = Hessian(0, self._matrix().device)
        other.features, other._upper = self.features, self._matrix().clone()
        other._weights = TokenWeights([*self._weights.added])
        return other

    @property
    def tokens(self) -> float:
        """Effective number of tokens, see `TokenWeights`."""
        return self._weights.tokens

    @property
    def weights(self) -> Tensor:
        """[T] weights of the tokens."""
        return self._weights.all

    def factor(self, damping: float) -> DenseFactor:
        """LDL factorization of the damped Hessian.

        This uses the Hessian up: afterwards nothing can be added or read. A Hessian of no tokens
        gives R = I and D = 1: quantizing with it is rounding to nearest. If the factorization
        fails, it is tried again with ten times the damping, up to DAMPING_RETRIES times, and one
        warning is logged. Peak memory: two [K, K] matrices.

        Args:
            damping: added to the diagonal, in units of its mean.

        Raises:
            NumericalError: the Hessian holds NaN or infinity, or stays singular.
        """
        upper = self._matrix()
        self._upper = None
        diagonal = upper.diagonal()
        mean = diagonal.double().mean().item()
        check_finite(diagonal)
        if mean == 0:
            return DenseFactor(
                upper.fill_diagonal_(1), torch.ones(self.features, device=upper.device), damping
            )
        upper /= mean
        for attempt in range(1 + DAMPING_RETRIES):
            used = damping * 10**attempt
            reverse = upper.flip(0, 1)  # J H J; holds its lower triangle
            reverse.diagonal().add_(used)
            if _cholesky_(reverse):
                if attempt:
                    warn_of_damping(damping, used)
                del upper, diagonal
                feedback = reverse.flip(0, 1)  # U = J L J
                root = feedback.diagonal().clone()
                feedback /= root
                return DenseFactor(feedback, root.square() * mean, used)
        raise not_definite(self.features, used)

    def _matrix(self) -> Tensor:
        if self._upper is None:
            raise RuntimeError("This Hessian was factored and is used up. Factor a copy.")
        return self._upper


def check_finite(diagonal: Tensor) -> None:
    """Check that a Hessian has finite numbers, by its diagonal [K].

    |H_jk|^2 <= H_jj H_kk, so an element that is not finite shows there.

    Raises:
        NumericalError: it has others.
    """
    if not diagonal.isfinite().all():
        raise NumericalError(
            "The Hessian holds NaN or infinity. Check the calibration data and the weights of the "
            "layers before this one."
        )


def warn_of_damping(damping: float, used: float) -> None:
    """Log that a Hessian needed more damping than asked for."""
    logger.warning(
        "The Hessian is not positive definite at damping %g; used %g instead.", damping, used
    )


def not_definite(features: int, damping: float) -> NumericalError:
    """The error of a Hessian [K, K] that stays singular."""
    return NumericalError(
        f"The Hessian [{features}, {features}] is not positive definite, not even at damping "
        f"{damping:g}. Raise the damping or use more calibration tokens."
    )


def _cholesky_(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of a matrix with its Cholesky factor L.

    LAPACK is column-major: it gets the transpose, whose *upper* Cholesky factor is L^T. So nothing
    is copied.

    Returns:
        False if the matrix is not positive definite.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, info))
    return info.item() == 0 and bool(matrix.diagonal().isfinite().all())
