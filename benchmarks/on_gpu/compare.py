"""Comparison of results on the card with an oracle, by |out - oracle| / |oracle| of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.self_test import ROUNDING, row_errors
from on_gpu.case import CheckError, Row


class Worst:
    """The worst float32 errors over many comparisons, and what was wrong."""

    def __init__(self) -> None:
        self.error = self.token_error = 0.0
        self.count = 0
        self.wrong: list[str] = []

    def __call__(
        self, label: str, found: Tensor, oracle: Tensor, tolerance: float, dtype: torch.dtype
    ) -> None:
        """Compare `found` in `dtype` with an oracle in float32 on the CPU."""
        self.count += 1
        if found.dtype != dtype or found.shape != oracle.shape:
            self.wrong.append(f"{label}: {list(found.shape)} {found.dtype}")
            return
        ours, exact = found.detach().cpu().double(), oracle.double()
        if ours.numel() == 0:
            return
        allowed = tolerance + ROUNDING[dtype]
        errors = row_errors(ours, exact)
        error = float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
        worst = float(errors.nan_to_num(nan=9e9, posinf=9e9).max())
        if dtype == torch.float32:
            self.error = max(self.error, error if error == error else 9e9)
            self.token_error = max(self.token_error, worst)
        if not worst <= allowed:
            bad = (~(errors <= allowed)).nonzero().flatten().tolist()
            self.wrong.append(
                f"{label}: error {worst:.3g}, allowed {allowed:.3g}; {len(bad)} of {len(errors)} "
                f"rows, first {bad[:6]}"
            )

    def same(self, label: str, found: Tensor, other: Tensor) -> None:
        """Check that two results are equal bit for bit."""
        self.count += 1
        if not torch.equal(_bytes(found), _bytes(other)):
            differ = int((found != other).sum())
            self.wrong.append(f"{label}: {differ} of {found.numel()} numbers differ")

    def expect(self, label: str, holds: bool) -> None:
        self.count += 1
        if not holds:
            self.wrong.append(label)

    def rows(self) -> list[Row]:
        row = {"compared": self.count, "error": self.error, "token_error": self.token_error}
        if self.wrong:
            more = f" (and {len(self.wrong) - 8} more)" if len(self.wrong) > 8 else ""
            raise CheckError(f"{row} WRONG {len(self.wrong)}: " + " | ".join(self.wrong[:8]) + more)
        return [row]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
