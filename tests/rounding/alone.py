"""Rounding of one matrix, by the functions that round several together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moepress.format.codec import Codec
from moepress.original.experts import RoutedExpert
from moepress.rounding.expert import GateUp, round_downs, round_gate_ups
from moepress.rounding.factor import Factor
from moepress.rounding.methods import Matrix, Unrounded
from moepress.rounding.methods.trellis import TrellisMatrix, quantize_together
from moepress.rounding.options import Rounding


def quantize_trellis(weight: Tensor, codec: Codec, factor: Factor | None) -> TrellisMatrix:
    """`quantize_together` for one matrix."""
    (matrix,) = quantize_together([Unrounded(weight, codec, factor)])
    return matrix


def round_gate_up(
    expert: RoutedExpert, rounding: Rounding, widths: Sequence[float]
) -> list[Matrix]:
    """`round_gate_ups` for one expert."""
    (matrices,) = round_gate_ups([expert], rounding, [widths])
    return matrices


def round_down(
    expert: RoutedExpert, gate_up: Tensor, rounding: Rounding, widths: Sequence[float]
) -> list[Matrix]:
    """`round_downs` for one expert."""
    (matrices,) = round_downs([expert], [GateUp(gate_up)], rounding, [widths])
    return matrices
