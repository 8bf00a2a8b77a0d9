"""The Hessian of a linear layer's squared output error, and its one triangular factorisation.

For weights W [N, K], rounded to What, and inputs x_t with importance weight_t, the squared error of
the outputs is a quadratic form that every row of E = W - What shares:

    sum_t weight_t || E x_t ||^2 = trace(E H E^T),      H = sum_t weight_t x_t x_t^T   [K, K]

With H = R D R^T, R unit *upper* triangular and D diagonal, it becomes a sum over columns:

    trace(E H E^T) = || E R D^(1/2) ||_F^2 = sum_k D_k || (E R)_k ||^2
    (E R)_k = E_k + sum_(j<k) E_j R_jk

so the errors of columns j < k act on column k as if w_k were moved by sum_(j<k) E_j R_jk. That is
all that GPTQ needs (gptq.py), so the inverse of H is never formed. R comes from one Cholesky
factorisation of H with its rows and columns in reverse order (J: the reversal, L lower triangular):

    J H J = L L^T   =>   H = (J L J)(J L J)^T = U U^T,  U upper;   R_jk = U_jk / U_kk,  D_k = U_kk^2
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.errors import NumericalError

TOKENS_PER_CHUNK = 4096  # bounds the float32 copy of the inputs
COLUMNS_PER_PANEL = 1024  # panels of H; the part of H under the diagonal is never computed
DAMPING_RETRIES = 4  # each with ten times the damping

logger = logging.getLogger("moepress.rounding.methods")


@dataclass(frozen=True)
class Factor:
    """H + damping * mean(diag H) * I = R D R^T. One factor serves every width."""

    feedback: Tensor  # [K, K] float32, R: unit upper triangular
    curvature: Tensor  # [K] float32, D: what a squared error of column k costs once the columns
    # after it have compensated
    damping: float  # what was used in the end


class Hessian:
    """Accumulates H = sum_t weight_t x_t x_t^T in float32. Holds one [K, K] matrix."""

    def __init__(self, features: int, device: torch.device | str) -> None:
        self.features = features
        self._weight = self._squared_weight = 0.0
        self._upper: Tensor | None = torch.zeros(
            features, features, dtype=torch.float32, device=device
        )

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds T tokens.

        Args:
            x: [T, K], any float dtype: the layer's inputs.
            weight: [T], at least 0: the importance of each token, 1 when absent.
        """
        upper = self._matrix()
        weights = torch.ones(len(x)) if weight is None else weight
        self._weight += weights.double().sum().item()
        self._squared_weight += weights.double().square().sum().item()
        for start in range(0, len(x), TOKENS_PER_CHUNK):
            part = x[start : start + TOKENS_PER_CHUNK].detach().to(upper.device, torch.float32)
            if weight is not None:
                root = weight[start : start + TOKENS_PER_CHUNK].to(part).sqrt()
                part = part * root[:, None]
            for a in range(0, self.features, COLUMNS_PER_PANEL):
                b = a + COLUMNS_PER_PANEL
                upper[a:b, a:].addmm_(part[:, a:b].T, part[:, a:])

    def copy(self) -> Hessian:
        """The same, to be factored apart."""
        other = Hessian(0, self._matrix().device)
        other.features, other._upper = self.features, self._matrix().clone()
        other._weight, other._squared_weight = self._weight, self._squared_weight
        return other

    @property
    def tokens(self) -> float:
        """How many tokens of equal importance would say as much."""
        return self._weight**2 / self._squared_weight if self._squared_weight else 0.0

    def factor(self, damping: float) -> Factor:
        """The factorisation of the damped Hessian. Uses the Hessian up: nothing can be added after.

        A Hessian of no tokens gives R = I and D = 1: quantizing with it is rounding to nearest.
        When the factorisation fails, damping is raised tenfold and it is tried again, with one
        warning. Peak memory: two [K, K] matrices.

        Args:
            damping: in units of the mean of the diagonal.

        Raises:
            NumericalError: the Hessian holds NaN or infinity, or stays singular.
        """
        upper = self._matrix()
        self._upper = None
        diagonal = upper.diagonal()
        mean = diagonal.double().mean().item()
        if not diagonal.isfinite().all():  # |H_jk|^2 <= H_jj H_kk: the diagonal shows it all
            raise NumericalError(
                "The Hessian holds NaN or infinity. Check the calibration data and the weights of "
                "the layers before this one."
            )
        if mean == 0:
            return Factor(
                upper.fill_diagonal_(1), torch.ones(self.features, device=upper.device), damping
            )
        upper /= mean
        for attempt in range(1 + DAMPING_RETRIES):
            used = damping * 10**attempt
            reverse = upper.flip(0, 1)  # J H J; holds its lower triangle
            reverse.diagonal().add_(used)
            if _cholesky_(reverse):
                if attempt:
                    logger.warning(
                        "The Hessian is not positive definite at damping %g; used %g instead.",
                        damping,
                        used,
                    )
                del upper, diagonal
                feedback = reverse.flip(0, 1)  # U = J L J
                root = feedback.diagonal().clone()
                feedback /= root
                return Factor(feedback, root.square() * mean, used)
        raise NumericalError(
            f"The Hessian [{self.features}, {self.features}] is not positive definite, not even at "
            f"damping {used:g}. Raise the damping or use more calibration tokens."
        )

    def _matrix(self) -> Tensor:
        if self._upper is None:
            raise RuntimeError("This Hessian was factored and holds nothing any more.")
        return self._upper


def _cholesky_(matrix: Tensor) -> bool:
    """Overwrites the lower triangle of a matrix by its Cholesky factor L; False when it has none.

    LAPACK is column-major, so it is given the transpose, whose *upper* factor is L^T: no copy.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, info))
    return info.item() == 0 and bool(matrix.diagonal().isfinite().all())
