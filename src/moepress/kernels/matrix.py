"""A packed matrix as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moepress.format.codec import Codec


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [rows, K].

    Attributes:
        weight: its bytes, docs/format.md.
    """

    weight: Tensor
    rows: int
    codec: Codec
