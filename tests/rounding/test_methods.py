"""Quantizers against slow oracles: explicit Hessians, OBQ column by column in float64.

How close float32 results must come to a float64 oracle depends on the CPU, because matrix products
and factorizations of different libraries add in different orders. The bounds here hold for every
order: they are the worst cases of Higham, "Accuracy and Stability of Numerical Algorithms"
(2nd edition), in units of UNIT. Let |A| be the matrix of absolute values. Then

- a sum of n products a_i b_i has an error of at most n UNIT sum_i |a_i b_i|          (eq. 3.5),
- a Cholesky factor of a [K, K] matrix A satisfies |L L^T - A| <= (K + 1) UNIT |L| |L^T| (th. 10.3),
- a solution of T x = b, T triangular, satisfies |T x - b| <= K UNIT |T| |x|            (th. 8.5).
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from moepress.errors import InputError, NumericalError
from moepress.format.codec import GRID_BITS, Codec
from moepress.rounding import factor as factor_module
from moepress.rounding import hessian
from moepress.rounding.factor import DenseFactor
from moepress.rounding.hessian import Hessian
from moepress.rounding.methods import (
    QUANTIZERS,
    QuantizedMatrix,
    grid,
    needs_hessian,
    quantize_matrix,
)

UNIT = 2.0**-24  # largest relative error of one rounding to float32
BFLOAT16_UNIT = 2.0**-8  # the same of bfloat16, which has 8 significant bits

ALL = [(name, bits) for name in QUANTIZERS for bits in GRID_BITS if name != "sign" or bits == 1]


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs whose Hessian has large off-diagonal entries and a wide spectrum.  # [T, K]"""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, features, generator=generator) * torch.logspace(0, -2, features)
    return latent @ torch.randn(features, features, generator=generator)


def random_weight(rows: int, cols: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def factor_of(x: Tensor, weight: Tensor | None = None, damping: float = 0.01) -> DenseFactor:
    accumulated = Hessian(x.shape[1], "cpu")
    accumulated.add(x, weight)
    return accumulated.factor(damping)


def dense_hessian(x: Tensor, damping: float = 0.01) -> Tensor:
    """H + damping * mean(diag H) * I in float64."""
    h = x.double().T @ x.double()
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def rebuilt(factor: DenseFactor) -> Tensor:
    """The matrix that a factor is of, R D R^T, in float64."""
    r = factor.feedback.double()
    return (r * factor.curvature.double()) @ r.T


def assert_factor_of(factor: DenseFactor, expected: Tensor, tokens: int) -> None:
    """Check that a factor is that of a damped Hessian [K, K] of so many tokens.

    With T tokens, H itself has an error of at most T UNIT |X^T| |X|, and its Cholesky factor adds
    (K + 1) UNIT |L| |L^T|. By the Cauchy-Schwarz inequality, both products of absolute values are
    at most sqrt(H_jj H_kk). Ten roundings are for weights of tokens, damping, mean, R and D.
    """
    energy = expected.diagonal().sqrt()
    bound = (tokens + len(expected) + 10) * UNIT * energy[:, None] * energy
    assert ((rebuilt(factor) - expected).abs() <= bound).all()


def hessian_loss(error: Tensor, h: Tensor) -> float:
    error = error.double()
    return float(((error @ h) * error).sum())


def stored_grid(q: QuantizedMatrix, group: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of a group in float64.  # [N], [N]"""
    levels = q.codec.levels
    scale = q.scales[:, group].double()
    if q.zeros is None:
        return scale, torch.full_like(scale, levels / 2)
    return scale, q.zeros[:, group].double() * levels / 255


def on_grid(w: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes of weights and the values they stand for."""
    codes = torch.clamp(torch.round(w / scale + zero), 0, levels)
    return codes, scale * (codes - zero)


def grids_of_columns(q: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """Scale and zero of every weight in float64.  # [N, K], [N, K]"""
    scales, zeros = (
        torch.stack([stored_grid(q, group)[part] for group in range(q.scales.shape[1])], 1)
        for part in (0, 1)
    )
    size = q.codec.group_size
    return scales.repeat_interleave(size, 1), zeros.repeat_interleave(size, 1)


def magnitudes(weight: Tensor, q: QuantizedMatrix) -> Tensor:
    """Sum of absolute values of all that is added to get the error of a weight.  # [N, K]"""
    scales, zeros = grids_of_columns(q)
    return weight.double().abs() + scales * (zeros + q.codes.double())


def assert_nearest(q: QuantizedMatrix, adjusted: Tensor, error: Tensor) -> None:
    """Check that every code is the nearest one to its adjusted weight.

    A code may be the second nearest only where the adjusted weight is within the error bound of
    the middle between two codes. Where adjusted weights fall between two codes is as good as
    random, so the number of such codes is at most about that of twice the bound, in code units.

    Args:
        q: the quantized matrix.
        adjusted: [N, K] float64, weights plus feedback, given the codes of `q`.
        error: [N, K] float64, bound on the error of the same in float32.
    """
    scales, zeros = grids_of_columns(q)
    position = (adjusted / scales + zeros).clamp(0, q.codec.levels)
    bound = error / scales
    assert bound.max() < 0.05  # or the test would say little
    distance = (position - q.codes.double()).abs()
    assert (distance <= 0.5 + bound).all()
    expected = float(2 * bound.sum())
    assert (distance > 0.5).sum() <= expected + 3 * expected**0.5 + 1


def feedback_error(weight: Tensor, q: QuantizedMatrix, factor: DenseFactor) -> Tensor:
    """Bound on the float32 error of the adjusted weights of gptq.  # [N, K]

    adjusted_k = w_k + sum_(j<k) E_j R_jk is a sum of k + 1 terms. An error E_j = w_j - what_j has
    at most 4 roundings of `magnitudes` itself; 4 more are for scaling to code units and back.
    """
    r = factor.feedback.double().abs()
    terms = torch.arange(len(r)) + 8
    errors = (weight.double() - q.dequantize().double()).abs()
    return UNIT * (terms * (errors @ r) + 8 * magnitudes(weight, q) @ r)


# Hessian


def test_factor_reconstructs_the_damped_hessian() -> None:
    x = correlated_inputs(300, 96)
    factor = factor_of(x, damping=0.02)
    expected = dense_hessian(x, 0.02)
    r = factor.feedback
    assert torch.equal(r.tril(-1), torch.zeros_like(r))
    assert torch.equal(r.diagonal(), torch.ones(96))
    assert_factor_of(factor, expected, tokens=300)
    assert factor.damping == 0.02


def test_hessian_weights_tokens_and_adds_up_in_any_chunking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = correlated_inputs(50, 40)
    importance = torch.rand(50, generator=torch.Generator().manual_seed(3))
    importance[7] = 0
    monkeypatch.setattr(hessian, "TOKENS_PER_CHUNK", 16)
    monkeypatch.setattr(factor_module, "COLUMNS_PER_SLICE", 12)
    accumulated = Hessian(40, "cpu")
    accumulated.add(x[:33], importance[:33])
    accumulated.add(x[33:], importance[33:])
    accumulated.add(x[:0], importance[:0])
    factor = accumulated.factor(0.01)
    assert_factor_of(factor, dense_hessian(x * importance.sqrt()[:, None]), tokens=50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hessian_of_any_float_dtype_accumulates_in_float32(dtype: torch.dtype) -> None:
    x = correlated_inputs(64, 32).to(dtype)
    factor = factor_of(x)
    assert factor.feedback.dtype == torch.float32
    assert_factor_of(factor, dense_hessian(x), tokens=64)


@pytest.mark.parametrize("exponent", [-57, 57])
def test_factor_does_not_depend_on_the_magnitude_of_inputs(exponent: int) -> None:
    """Powers of two scale exactly, so the factors must agree to the bit.

    Inputs are multiples of 1/16. So the smallest product at 2**-57 is 2**-122, no subnormal number.
    The trace at 2**57 is beyond the largest float32.
    """
    x = (correlated_inputs(64, 32) * 16).round() / 16
    plain, scaled = factor_of(x), factor_of(x * 2.0**exponent)
    assert torch.equal(scaled.feedback, plain.feedback)
    assert torch.equal(scaled.curvature, plain.curvature * 2.0 ** (2 * exponent))


def test_hessian_of_no_token_is_the_identity_and_gptq_is_rtn() -> None:
    factor = Hessian(64, "cpu").factor(0.01)
    assert torch.equal(factor.feedback, torch.eye(64))
    assert torch.equal(factor.curvature, torch.ones(64))
    weight = random_weight(9, 64)
    for bits in GRID_BITS:
        codec = Codec(bits, 32)
        a = quantize_matrix("gptq", weight, codec, factor)
        b = quantize_matrix("rtn", weight, codec)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_hessian_is_refused(bad: float) -> None:
    x = correlated_inputs(20, 32)
    x[3, 5] = bad
    with pytest.raises(NumericalError, match="Hessian holds NaN"):
        factor_of(x)


def test_indefinite_hessian_raises_damping_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def indefinite(size: float) -> Hessian:
        accumulated = Hessian(32, "cpu")
        accumulated.add(torch.eye(32))
        accumulated._matrix()[0, 31] = 1 + size  # eigenvalue -size
        return accumulated

    with caplog.at_level(logging.WARNING, "moepress.rounding.hessian"):
        factor = indefinite(0.05).factor(0.001)
    assert factor.damping == pytest.approx(0.1)
    assert len(caplog.records) == 1
    assert "0.001" in caplog.text and "0.1" in caplog.text
    r = factor.feedback.double()
    assert ((r * factor.curvature) @ r.T)[0, 31] == pytest.approx(1.05)
    with pytest.raises(NumericalError, match="not positive definite"):
        indefinite(1e6).factor(0.001)


# Quantized matrices


@pytest.mark.parametrize(("name", "bits"), ALL)
@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(1, 32, 32), (7, 96, 32), (33, 192, 64), (5, 384, 128)]
)
def test_shapes_dtypes_and_dequantize(
    name: str, bits: int, rows: int, cols: int, group: int
) -> None:
    codec = Codec(bits, group)
    factor = factor_of(correlated_inputs(2 * cols, cols))
    q = quantize_matrix(name, random_weight(rows, cols).bfloat16(), codec, factor)
    assert q.codes.shape == (rows, cols) and q.codes.dtype == torch.uint8
    assert q.codes.is_contiguous() and int(q.codes.max()) <= codec.levels
    assert q.scales.shape == (rows, cols // group) and q.scales.dtype == torch.bfloat16
    assert (q.zeros is not None) == codec.has_zero
    values = torch.empty(rows, cols, dtype=torch.float64)
    for k in range(cols):
        scale, zero = stored_grid(q, k // group)
        values[:, k] = scale * (q.codes[:, k].double() - zero)
    # Two roundings make the zero, one subtracts it, one scales; none of these exceeds the levels.
    scales, _ = grids_of_columns(q)
    assert ((q.dequantize().double() - values).abs() <= 4 * UNIT * scales * codec.levels).all()
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_the_same_input_gives_the_same_bytes(name: str, bits: int) -> None:
    factor, weight = factor_of(correlated_inputs(300, 128)), random_weight(21, 128)
    before = weight.clone()
    first = quantize_matrix(name, weight, Codec(bits, 64), factor)
    again = quantize_matrix(name, weight, Codec(bits, 64), factor)
    assert torch.equal(weight, before)
    assert torch.equal(first.pack(), again.pack())


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_rows_are_independent(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of each comparison multiply matrices of one shape, so they agree to the bit."""
    factor, weight = factor_of(correlated_inputs(300, 128)), random_weight(21, 128)
    codec = Codec(bits, 64)
    monkeypatch.setattr(grid, "ROWS_PER_CHUNK", {"cpu": 8})
    whole = quantize_matrix(name, weight, codec, factor)
    for start in (0, 8, 16):  # chunk by chunk
        rows = slice(start, start + 8)
        alone = quantize_matrix(name, weight[rows], codec, factor)
        assert torch.equal(whole.codes[rows], alone.codes)
        assert torch.equal(whole.scales[rows], alone.scales)
    weight[::2] *= 7  # other rows of the same chunk
    other = quantize_matrix(name, weight, codec, factor)
    assert torch.equal(whole.codes[1::2], other.codes[1::2])
    assert torch.equal(whole.scales[1::2], other.scales[1::2])


@pytest.mark.parametrize("bits", GRID_BITS)
def test_gptq_equals_obq(bits: int) -> None:
    """Greedy OBQ with explicit inverses, in float64, on the grids that gptq chose.

    OBQ is given the Hessian that R and D are the exact factors of, and continues from the codes of
    gptq, so that the rounding errors of R and of earlier columns play no part.
    """
    cols, group = 128, 64
    weight, factor = random_weight(11, cols), factor_of(correlated_inputs(400, cols))
    q = quantize_matrix("gptq", weight, Codec(bits, group), factor)
    h, remaining = rebuilt(factor), weight.double()
    adjusted, values = torch.empty_like(remaining), q.dequantize().double()
    for k in range(cols):
        adjusted[:, k] = remaining[:, k]
        inverse = torch.linalg.inv(h[k:, k:])
        residual = (remaining[:, k] - values[:, k]) / inverse[0, 0]
        remaining[:, k:] -= residual[:, None] * inverse[0]
    assert_nearest(q, adjusted, feedback_error(weight, q, factor))


@pytest.mark.parametrize("bits", GRID_BITS)
def test_loss_is_the_sum_of_squared_residuals_times_curvature(bits: int) -> None:
    x, weight = correlated_inputs(400, 192), random_weight(13, 192)
    factor, h = factor_of(x), dense_hessian(x)
    q = quantize_matrix("gptq", weight, Codec(bits, 64), factor)
    error = weight.double() - q.dequantize().double()
    residual = error @ factor.feedback.double()
    by_columns = float((residual.square() @ factor.curvature.double()).sum())
    # The bound of `assert_factor_of` on both sides of E H E^T.
    bound = (400 + 192 + 10) * UNIT * float((error.abs() @ h.diagonal().sqrt()).square().sum())
    assert by_columns == pytest.approx(hessian_loss(error, h), rel=0, abs=bound)
    # residual = adjusted - rounded, and adjusted was rounded to the nearest code.
    adjusted = q.dequantize().double() + residual
    assert_nearest(q, adjusted, feedback_error(weight, q, factor))


@pytest.mark.parametrize("bits", GRID_BITS)
def test_gptq_loses_less_than_rtn_and_than_released(bits: int) -> None:
    x, weight = correlated_inputs(600, 256), random_weight(32, 256)
    factor, h = factor_of(x), dense_hessian(x)
    loss = {
        name: hessian_loss(
            weight - quantize_matrix(name, weight, Codec(bits, 128), factor).dequantize(), h
        )
        for name in ("gptq", "rtn", "gptq-released")
    }
    assert loss["gptq"] < 0.8 * loss["rtn"]
    assert loss["gptq"] <= loss["gptq-released"]


@pytest.mark.parametrize(("bits", "group"), [(1, 64), (2, 64), (3, 32)])
def test_released_equals_the_published_algorithm(bits: int, group: int) -> None:
    """MC's loop: weights of a block do not see each other's errors, later blocks do.

    In float64, and as in `test_gptq_equals_obq` with the Hessian of R and D, from the codes of `q`.
    Damping 1: the inverses of less damped factors have entries so large that the bound on rounding
    errors would exceed a code.
    """
    cols = 320  # two whole blocks and a half
    x, weight = correlated_inputs(700, cols), random_weight(11, cols)
    factor = factor_of(x, damping=1.0)
    q = quantize_matrix("gptq-released", weight, Codec(bits, group), factor)
    upper = torch.linalg.cholesky(torch.linalg.inv(rebuilt(factor)), upper=True)
    remaining, values = weight.double(), q.dequantize().double()
    adjusted = torch.empty_like(remaining)
    for start in range(0, cols, 128):
        block = slice(start, min(start + 128, cols))
        adjusted[:, block] = remaining[:, block]
        passed_on = (remaining[:, block] - values[:, block]) / upper.diagonal()[block]
        remaining[:, block.stop :] -= passed_on @ upper[block, block.stop :]
    error = released_error(weight, q, factor, adjusted)
    assert_nearest(q, adjusted, error)
    parts, errors = (t.view(11, -1, group) for t in (adjusted, error))  # [N, G, B]
    if bits == 1:
        scales = 2 * parts.abs().mean(2)
    else:
        scales = (parts.amax(2).clamp(min=0) - parts.amin(2).clamp(max=0)) / q.codec.levels
    # Neither the mean nor the largest and smallest of a group move further than its weights do.
    bound = 2 * errors.amax(2) + (group + 4) * UNIT * scales + BFLOAT16_UNIT * scales
    assert ((q.scales.double() - scales).abs() <= bound).all()
    correct = quantize_matrix("gptq", weight, Codec(bits, group), factor)
    assert not torch.equal(correct.codes, q.codes)


def released_error(
    weight: Tensor, q: QuantizedMatrix, factor: DenseFactor, adjusted: Tensor
) -> Tensor:
    """Bound on the float32 error of the adjusted weights of gptq-released.  # [N, K]

    Let b be a block, y what is passed on (gptq.py), S = y_(<b) R_(<b,b), and n the columns up to
    the end of the block. S is a sum of products. passed = S R_bb^-1 and residual R_bb^-1 are
    solutions of triangular systems: the error of a solution z of z R_bb = c is at most the error of
    c and n UNIT |z| |R_bb|, times |R_bb^-1|.
    """
    r = factor.feedback.double()
    size = r.abs()
    y, y_error = torch.zeros_like(adjusted), torch.zeros_like(adjusted)
    result = torch.empty_like(adjusted)
    own = magnitudes(weight, q)
    for start in range(0, len(r), 128):
        block, before = slice(start, min(start + 128, len(r))), slice(0, start)
        inverse = torch.linalg.inv(r[block, block])
        roundings = (block.stop + 8) * UNIT

        def solved(right: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
            z = right @ inverse  # noqa: B023
            system = roundings * z.abs() @ size[block, block]  # noqa: B023
            return z, (error + system) @ inverse.abs()  # noqa: B023

        total = y[:, before] @ r[before, block]
        total_error = (y_error[:, before] + roundings * y[:, before].abs()) @ size[before, block]
        passed, passed_error = solved(total, total_error)
        result[:, block] = passed_error + 8 * UNIT * (own[:, block] + passed.abs())
        residual = adjusted[:, block] - q.dequantize().double()[:, block]
        found, found_error = solved(residual, result[:, block])
        y[:, block] = found - passed
        y_error[:, block] = found_error + passed_error + UNIT * y[:, block].abs()
    return result


def test_parameters_that_require_gradients_are_accepted() -> None:
    x = correlated_inputs(99, 64).requires_grad_()
    weight = torch.nn.Parameter(random_weight(4, 64))
    for name in QUANTIZERS:
        q = quantize_matrix(name, weight, Codec(1, 64), factor_of(x))
        assert not q.scales.requires_grad and not q.dequantize().requires_grad


def test_sign_is_the_mean_magnitude_and_one_bit_only() -> None:
    weight = random_weight(5, 64)
    q = quantize_matrix("sign", weight, Codec(1, 64))
    mean = weight.abs().mean(1, keepdim=True)
    rounded = BFLOAT16_UNIT + 64 * UNIT  # of the scale, of the sum
    torch.testing.assert_close(q.dequantize(), weight.sign() * mean, rtol=rounded, atol=0)
    with pytest.raises(InputError, match="1-bit"):
        quantize_matrix("sign", weight, Codec(2, 64))


# Grids


def grid_error(block: Tensor, chosen: grid.Grid, codec: Codec, weight: Tensor) -> Tensor:
    _, value = on_grid(block.double(), chosen.scale.double(), chosen.zero.double(), codec.levels)
    return weight.double() @ (block.double() - value).square()


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0])
def test_searched_grid_is_never_worse_than_min_max_or_a_shrunken_copy(
    bits: int, shift: float
) -> None:
    codec = Codec(bits, 64)
    block = random_weight(64, 200).pow(3) + shift
    weight = torch.rand(64, generator=torch.Generator().manual_seed(5)).pow(4) + 1e-4
    min_max = grid.min_max(block, codec)
    searched = grid_error(block, grid.search(block, codec, weight), codec, weight)
    spanned = grid_error(block, min_max, codec, weight)
    # Both are judged in float32. A position is at most `levels`, so a residual r has an error of at
    # most 3 UNIT levels, and its square 2 |r| times that. A sum of 64 adds 64 UNIT of itself; eight
    # more are for weights and scales. Mean |r| is at most the root of mean r^2 (Cauchy-Schwarz).
    unit = min_max.scale.double() * weight.double().sum().sqrt()  # root of the error if all r are 1
    judged = 72 * UNIT * spanned + 6 * UNIT * codec.levels * unit * spanned.sqrt()
    assert (searched <= spanned + 2 * judged).all()
    if bits in grid.SHRINK:
        copy = grid.Grid.of(min_max.scale * grid.SHRINK[bits], min_max.zero, codec)
        assert (searched <= grid_error(block, copy, codec, weight) + 2 * judged).all()
    if bits in (1, 2, 3):
        assert searched.sum() < 0.8 * spanned.sum()


@pytest.mark.parametrize("bits", GRID_BITS)
def test_grid_values_can_be_stored(bits: int) -> None:
    codec = Codec(bits, 32)
    block = random_weight(32, 100)
    chosen = grid.search(block, codec, torch.ones(32))
    assert torch.equal(chosen.scale, chosen.scale.bfloat16().float())
    if codec.has_zero:
        zero_code = (chosen.zero * 255 / codec.levels).round()
        assert torch.equal(chosen.zero, zero_code * codec.levels / 255)
    else:
        assert (chosen.zero == codec.levels / 2).all()


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_zero_rows_groups_and_columns(name: str, bits: int) -> None:
    """Dead inputs (zero rows of H) and zero weights, apart and together."""
    x, weight = correlated_inputs(300, 128), random_weight(6, 128)
    x[:, 10:40] = 0
    weight[:, 30:60] = 0
    weight[2] = 0
    weight[3, 64:] = 0
    q = quantize_matrix(name, weight, Codec(bits, 64), factor_of(x))
    assert q.dequantize().isfinite().all()
    assert torch.equal(q.dequantize()[2], torch.zeros(128))
    if name in ("rtn", "sign"):
        assert torch.equal(q.dequantize()[3, 64:], torch.zeros(64))


@pytest.mark.parametrize(("name", "bits"), ALL)
@pytest.mark.parametrize("value", [0.37, -2.0])
def test_constant_groups_are_kept(name: str, bits: int, value: float) -> None:
    q = quantize_matrix(name, torch.full((3, 64), value), Codec(bits, 32), factor_of(torch.eye(64)))
    # Zero is on the grid exactly, and so are the ends of the group up to the rounding of the scale.
    rounded = BFLOAT16_UNIT + 8 * UNIT
    torch.testing.assert_close(q.dequantize(), torch.full((3, 64), value), rtol=rounded, atol=0)


@pytest.mark.parametrize(("name", "bits"), ALL)
@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_magnitude_of_weights_changes_only_the_scales(name: str, bits: int, exponent: int) -> None:
    factor = factor_of(correlated_inputs(200, 64))
    weight = random_weight(8, 64)
    plain = quantize_matrix(name, weight, Codec(bits, 64), factor)
    scaled = quantize_matrix(name, weight * 2.0**exponent, Codec(bits, 64), factor)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scales.float(), plain.scales.float() * 2.0**exponent)


def test_weights_too_small_for_a_scale_become_zero() -> None:
    q = quantize_matrix("rtn", torch.full((2, 32), 1e-39), Codec(4, 32))
    assert torch.equal(q.dequantize(), torch.zeros(2, 32))


# Refusals


def test_bad_arguments_are_refused() -> None:
    weight, factor = random_weight(4, 64), factor_of(correlated_inputs(99, 64))
    with pytest.raises(InputError, match="No quantizer 'awq'"):
        quantize_matrix("awq", weight, Codec(2, 64))
    with pytest.raises(InputError, match="No quantizer 'awq'"):
        needs_hessian("awq")
    with pytest.raises(InputError, match="needs the factor"):
        quantize_matrix("gptq", weight, Codec(2, 64))
    with pytest.raises(InputError, match="64 inputs"):
        quantize_matrix("gptq", random_weight(4, 128), Codec(2, 64), factor)
    with pytest.raises(InputError, match="does not divide"):
        quantize_matrix("rtn", random_weight(4, 96), Codec(2, 64))
    with pytest.raises(InputError, match="2 dimensions"):
        quantize_matrix("rtn", random_weight(4, 64)[0], Codec(2, 64))
    for bad in (torch.nan, -torch.inf):
        broken = weight.clone()
        broken[3, 63] = bad
        for name in ("rtn", "gptq"):
            with pytest.raises(NumericalError, match="weight matrix holds NaN"):
                quantize_matrix(name, broken, Codec(2, 64), factor)
    with pytest.raises(NumericalError, match="overflowed"):
        quantize_matrix("rtn", weight.clamp(-1, 1) * 3.4e38, Codec(1, 64))


def test_gptq_needs_a_hessian_and_rtn_and_sign_do_not() -> None:
    assert {name: needs_hessian(name) for name in QUANTIZERS} == {
        "gptq": True,
        "gptq-released": True,
        "rtn": False,
        "sign": False,
    }
