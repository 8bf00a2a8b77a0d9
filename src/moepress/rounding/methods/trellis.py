"""Rounding to trellis codes: eight columns at a time, with feedback of the errors before them.

The rows are rotated (kernels/trellis.py), and the Hessian is that of the rotated inputs. As in
gptq.py the squared output error is a sum over columns, but here the eight columns of a column block
are rounded together, by one search for the best paths through all rows. With R = U D^(-1/2) of
hessian.py, and U_BB the diagonal block of U that belongs to column block B,

    trace(E H E^T) = sum_B || (E V)_B U_BB ||^2,     V_JB = R_JB R_BB^(-1),  V_BB = I,

so column block B is rounded after adding sum_(J<B) E_J V_JB to it: block LDLQ (QuIP#,
arXiv:2402.04396). The search gives all errors inside a column block the same weight, in place of
U_BB: rotated inputs have nearly equal energies.

Each row has one scale s. The search uses the row's root mean square times START, over the standard
deviation of the code's values. With a Hessian it is also multiplied by START_FACTOR_WITH_FEEDBACK,
because feedback changes the spread of the targets. Afterwards s is set to the best value for the
codes that were found (fit.py), and rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moepress.errors import InputError, NumericalError
from moepress.format.codec import ROWS_PER_SLAB, Codec
from moepress.kernels import cpu, trellis
from moepress.kernels.cuda import values
from moepress.kernels.cuda.search import available
from moepress.kernels.trellis import TILE_COLUMNS, code_matrix, deviation
from moepress.memory import free_memory
from moepress.rounding.factor import Factor
from moepress.rounding.fit import best_scale, inverse
from moepress.rounding.methods.viterbi import round_together
from moepress.rounding.rotation import rotate, rotate_back
from moepress.rounding.sweep import Feedback, sweep_together

# By code bits. The scale of the search makes the standard deviation of the values START times that
# of the row's weights: best for Gaussian weights without feedback. With feedback the ratio is
# START * START_FACTOR_WITH_FEEDBACK: best for matrices of trained models
# (docs/log.md#first-scale-by-width, decided in docs/log.md#first-scale).
START = {1: 0.96, 1.5: 0.98, 2: 1.11, 2.5: 1.09, 3: 1.18, 3.5: 1.12, 4: 1.20}
START_FACTOR_WITH_FEEDBACK = {1: 1.15, 1.5: 1.13, 2: 1.0, 2.5: 1.02, 3: 0.95, 3.5: 1.01, 4: 0.95}


@dataclass(frozen=True)
class TrellisMatrix:
    """A weight matrix as branches of trellis paths and one scale for each row."""

    branches: Tensor  # [64 S, K] uint8, S = N / 64 rounded up
    scales: Tensor  # [N] bfloat16
    codec: Codec

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [N, K] that the codes stand for, rotated back.

        Computed in float32, then cast to `dtype`.
        """
        codes = path_values(self.branches, self.codec.bits)[: len(self.scales)]
        return rotate_back(codes * self.scales.float()[:, None]).to(dtype)

    def scaled(self, gain: float) -> TrellisMatrix:
        """This matrix times a gain above 0. Only its scales change; they are rounded again."""
        return replace(self, scales=(self.scales.float() * gain).bfloat16())

    def pack(self) -> Tensor:
        """The stored bytes (docs/format.md)."""
        pack_with = cpu.trellis_pack if _is_compiled_for(self.branches) else None
        return trellis.pack(self.branches, self.scales, self.codec, pack_with)


class Unrounded(NamedTuple):
    """A weight matrix to round."""

    weight: Tensor  # [N, K], any float dtype; not changed
    codec: Codec  # of the trellis family
    factor: Factor | None  # of the Hessian of the *rotated* inputs; None: no feedback
    products: torch.dtype = torch.float32  # of the products that fit the scales (sweep.py)


def quantize_together(matrices: Sequence[Unrounded]) -> list[TrellisMatrix]:
    """Round weight matrices of one shape to trellis codes.

    Each result is what the matrix alone would give. A card searches the same columns of several
    matrices at a time, as many as have room: the paths of one would leave most of it idle.

    Raises:
        InputError: a weight is no matrix, shapes differ, or K is no multiple of a group size.
        NumericalError: a weight holds NaN or infinity.
    """
    for weight, codec, *_ in matrices:
        if weight.dim() != 2:
            raise InputError(f"weight must be [N, K], got {list(weight.shape)}.")
        codec.groups(weight.shape[1])  # raises InputError if the group size does not divide K
    shapes = {weight.shape for weight, *_ in matrices}
    if len(shapes) > 1:
        raise InputError(f"Matrices of one shape can be rounded together, got {shapes}.")
    step = 1
    device = matrices[0].weight.device
    if available(device):
        # Beside the arguments: two copies in float32, two of bytes, and V of each factor; and of
        # one matrix at a time three more copies, and of one factor another V.
        count, columns = matrices[0].weight.numel(), matrices[0].weight.shape[1]
        factors = len({id(one.factor) for one in matrices})
        # The codes of all stay.
        shared = 12 * count + 4 * (factors + 1) * columns**2 + count * len(matrices)
        room = free_memory(device) - 1.1 * shared
        step = min(max(1, int(room // (10 * count))), len(matrices))
        step = -(-len(matrices) // -(-len(matrices) // step))  # groups of equal size
    results: list[TrellisMatrix] = []
    while len(results) < len(matrices):
        found = _quantize_if_room(matrices[len(results) :][:step], may_fail=step > 1)
        results += found
        if not found:  # free memory may lie in pieces; here what the error held is gone
            step = -(-step // 2)
    return results


def _quantize_if_room(matrices: Sequence[Unrounded], may_fail: bool) -> list[TrellisMatrix]:
    """Matrices rounded together; none where there is no memory for so many, if it may fail."""
    try:
        return _quantize(matrices)
    except torch.OutOfMemoryError:
        if not may_fail:
            raise
        return []


def _quantize(matrices: Sequence[Unrounded]) -> list[TrellisMatrix]:
    rows = _Rotated()
    branches, residual, scales = _searched(rows, matrices)
    results = []
    for number, (weight, codec, factor, dtype) in enumerate(matrices):
        found = branches[number].T.contiguous()
        left = residual[number, :, : len(weight)].contiguous()
        scale = best_scale(rows.again(weight), scales[number], left, factor, dtype)
        results.append(TrellisMatrix(found, scale.bfloat16(), codec))
    return results


class _Rotated:
    """Rotated weights, `rotated_rows`. A card rotates them again rather than keep them."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # by weight

    def of(self, weight: Tensor) -> Tensor:
        if weight.is_cuda:
            return rotated_rows(weight)
        if id(weight) not in self._kept:
            self._kept[id(weight)] = rotated_rows(weight)
        return self._kept[id(weight)]

    def again(self, weight: Tensor) -> Tensor:
        return rotate(weight.float()) if weight.is_cuda else self._kept[id(weight)]


def first_scale(rows: Tensor, codec: Codec, with_feedback: bool) -> Tensor:
    """The scale of each row [N] float32 that the search uses.

    Args:
        rows: [N, K] float32, rotated weights.
    """
    start = START[codec.bits]
    if with_feedback:
        start *= START_FACTOR_WITH_FEEDBACK[codec.bits]
    return rows.square().mean(1).sqrt() * (start / deviation(codec.bits))


def _searched(rows: _Rotated, matrices: Sequence[Unrounded]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Codes [M, K, 64 S] uint8 of M matrices, columns first, what feedback has left, and scales.

    What is left is r = E V, [M, K, 64 S] float32, in units of the scale of each row, [N] float32.
    """
    length, columns = matrices[0].weight.shape
    shape = (len(matrices), columns, length + -length % ROWS_PER_SLAB)
    # in units of `code_values`; then what is left
    target = torch.zeros(shape, dtype=torch.float32, device=matrices[0].weight.device)
    scales = []
    for number, (weight, codec, factor, _) in enumerate(matrices):
        some = rows.of(weight)
        scales.append(first_scale(some, codec, factor is not None))
        torch.mul(some.T, inverse(scales[-1]), out=target[number, :, :length])
        del some  # before the next ones are made
    branches = torch.empty(shape, dtype=torch.uint8, device=target.device)
    buffer = torch.zeros_like(target)  # feedback until a column block is rounded, then its errors
    bits = [one.codec.bits for one in matrices]

    def round_block(start: int, stop: int) -> None:
        round_together(target, buffer, branches, bits, start)

    feedback: dict[int, Feedback] = {}  # V by factor
    pairs = []
    for number, (_, _, factor, _) in enumerate(matrices):
        if factor is not None:
            if id(factor) not in feedback:
                feedback[id(factor)] = factor.by_block()
            pairs.append((buffer[number], feedback[id(factor)]))
    sweep_together(pairs, 0, columns, TILE_COLUMNS, round_block)
    return branches, target, scales


def rotated_rows(weight: Tensor) -> Tensor:
    """W Q^T, [N, K] float32.

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    rows = rotate(weight.float())
    if not rows.isfinite().all():
        raise NumericalError("The weight holds NaN or infinity.")
    return rows


def path_values(branches: Tensor, bits: float) -> Tensor:
    """`code_matrix`, compiled where that is possible."""
    if available(branches.device):
        return values.code_matrix(branches, bits)
    return (cpu.trellis_values if _is_compiled_for(branches) else code_matrix)(branches, bits)


def _is_compiled_for(branches: Tensor) -> bool:
    return branches.device.type == "cpu" and cpu.missing() is None
