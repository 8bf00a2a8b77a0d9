"""Quantizers against slow oracles: explicit Hessians, OBQ column by column in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from moepress.errors import InputError, NumericalError
from moepress.format.codec import GRID_BITS, Codec
from moepress.rounding import hessian
from moepress.rounding.hessian import Factor, Hessian
from moepress.rounding.methods import (
    QUANTIZERS,
    QuantizedMatrix,
    grid,
    needs_hessian,
    quantize_matrix,
)

ALL = [(name, bits) for name in QUANTIZERS for bits in GRID_BITS if name != "sign" or bits == 1]


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs whose Hessian has large off-diagonal entries and a wide spectrum.  # [T, K]"""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, features, generator=generator) * torch.logspace(0, -2, features)
    return latent @ torch.randn(features, features, generator=generator)


def random_weight(rows: int, cols: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def factor_of(x: Tensor, weight: Tensor | None = None, damping: float = 0.01) -> Factor:
    accumulated = Hessian(x.shape[1], "cpu")
    accumulated.add(x, weight)
    return accumulated.factor(damping)


def dense_hessian(x: Tensor, damping: float = 0.01) -> Tensor:
    """H + damping * mean(diag H) * I in float64."""
    h = x.double().T @ x.double()
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


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


# Hessian


def test_factor_reconstructs_the_damped_hessian() -> None:
    x = correlated_inputs(300, 96)
    factor = factor_of(x, damping=0.02)
    expected = dense_hessian(x, 0.02)
    r = factor.feedback.double()
    assert torch.equal(r.tril(-1), torch.zeros_like(r))
    assert torch.equal(r.diagonal(), torch.ones(96, dtype=torch.float64))
    rebuilt = (r * factor.curvature.double()) @ r.T
    assert (rebuilt - expected).abs().max() < 2e-6 * expected.abs().max()
    assert factor.damping == 0.02


def test_hessian_weights_tokens_and_adds_up_in_any_chunking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = correlated_inputs(50, 40)
    importance = torch.rand(50, generator=torch.Generator().manual_seed(3))
    importance[7] = 0
    monkeypatch.setattr(hessian, "TOKENS_PER_CHUNK", 16)
    monkeypatch.setattr(hessian, "COLUMNS_PER_PANEL", 12)
    accumulated = Hessian(40, "cpu")
    accumulated.add(x[:33], importance[:33])
    accumulated.add(x[33:], importance[33:])
    accumulated.add(x[:0], importance[:0])
    factor = accumulated.factor(0.01)
    expected = dense_hessian(x * importance.sqrt()[:, None])
    r = factor.feedback.double()
    rebuilt = (r * factor.curvature.double()) @ r.T
    assert (rebuilt - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hessian_of_any_float_dtype_accumulates_in_float32(dtype: torch.dtype) -> None:
    x = correlated_inputs(64, 32).to(dtype)
    factor = factor_of(x)
    r = factor.feedback.double()
    expected = dense_hessian(x)
    rebuilt = (r * factor.curvature.double()) @ r.T
    assert factor.feedback.dtype == torch.float32
    assert (rebuilt - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("magnitude", [1e-17, 1e17])
def test_factor_does_not_depend_on_the_magnitude_of_inputs(magnitude: float) -> None:
    x = correlated_inputs(64, 32)
    plain, scaled = factor_of(x), factor_of(x * magnitude)
    torch.testing.assert_close(scaled.feedback, plain.feedback, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled.curvature, plain.curvature * magnitude**2, rtol=1e-4, atol=0)


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

    with caplog.at_level(logging.WARNING, "moepress.rounding.methods"):
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
    torch.testing.assert_close(q.dequantize().double(), values, rtol=3e-7, atol=1e-6)
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_same_input_same_bytes_and_rows_are_independent(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = factor_of(correlated_inputs(300, 128))
    weight = random_weight(21, 128)
    before = weight.clone()
    first = quantize_matrix(name, weight, Codec(bits, 64), factor)
    again = quantize_matrix(name, weight, Codec(bits, 64), factor)
    assert torch.equal(weight, before)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scales, again.scales)
    monkeypatch.setattr(grid, "ROWS_PER_CHUNK", {"cpu": 8})
    chunked = quantize_matrix(name, weight, Codec(bits, 64), factor)
    torch.testing.assert_close(chunked.dequantize(), first.dequantize(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", GRID_BITS)
def test_gptq_equals_obq(bits: int) -> None:
    """Greedy OBQ with explicit inverses, in float64, on the grids that gptq chose."""
    cols, group = 128, 64
    x, weight = correlated_inputs(400, cols), random_weight(11, cols)
    q = quantize_matrix("gptq", weight, Codec(bits, group), factor_of(x))
    h, remaining = dense_hessian(x), weight.double()
    codes = torch.empty_like(remaining)
    for k in range(cols):
        scale, zero = stored_grid(q, k // group)
        codes[:, k], value = on_grid(remaining[:, k], scale, zero, q.codec.levels)
        inverse = torch.linalg.inv(h[k:, k:])
        residual = (remaining[:, k] - value) / inverse[0, 0]
        remaining[:, k:] -= residual[:, None] * inverse[0]
    # A weight within float32 rounding of the middle of two codes may go either way, and takes the
    # rest of its row with it.
    rows_equal = (codes == q.codes).all(1)
    assert rows_equal.sum() >= (9 if bits == 8 else 10)


@pytest.mark.parametrize("bits", GRID_BITS)
def test_loss_is_the_sum_of_squared_residuals_times_curvature(bits: int) -> None:
    x, weight = correlated_inputs(400, 192), random_weight(13, 192)
    factor = factor_of(x)
    q = quantize_matrix("gptq", weight, Codec(bits, 64), factor)
    error = (weight - q.dequantize()).double()
    residual = error @ factor.feedback.double()
    by_columns = float((residual.square() @ factor.curvature.double()).sum())
    assert by_columns == pytest.approx(hessian_loss(error, dense_hessian(x)), rel=1e-4)
    # residual = adjusted - rounded, and adjusted was rounded to the nearest code.
    for k in range(192):
        scale, zero = stored_grid(q, k // 64)
        adjusted = q.dequantize()[:, k].double() + residual[:, k]
        codes, _ = on_grid(adjusted, scale, zero, q.codec.levels)
        assert (codes == q.codes[:, k]).float().mean() > 0.9


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


@pytest.mark.parametrize(("bits", "group"), [(1, 128), (2, 128), (3, 32), (2, 64)])
def test_released_equals_the_published_algorithm(bits: int, group: int) -> None:
    """MC's loop: weights of a block do not see each other's errors, later blocks do."""
    cols = 320  # two whole blocks and a half
    group = min(group, 64)
    x, weight = correlated_inputs(700, cols), random_weight(11, cols)
    q = quantize_matrix("gptq-released", weight, Codec(bits, group), factor_of(x))
    inverse = torch.linalg.inv(dense_hessian(x))
    upper = torch.linalg.cholesky(inverse, upper=True)
    remaining, codes = weight.double(), torch.empty(11, cols, dtype=torch.float64)
    for start in range(0, cols, 128):
        stop = min(start + 128, cols)
        error = torch.empty(11, stop - start, dtype=torch.float64)
        for k in range(start, stop):
            scale, zero = stored_grid(q, k // group)
            codes[:, k], value = on_grid(remaining[:, k], scale, zero, q.codec.levels)
            error[:, k - start] = (remaining[:, k] - value) / upper[k, k]
        for first in range(start, stop, group):
            part = remaining[:, first : first + group].float().T.contiguous()
            expected = (grid.mean_magnitude if bits == 1 else grid.min_max)(part, q.codec)
            torch.testing.assert_close(
                expected.scale, q.scales[:, first // group].float(), rtol=0.005, atol=0
            )
        remaining[:, stop:] -= error @ upper[start:stop, stop:]
    assert (codes == q.codes).all(1).sum() >= 10
    correct = quantize_matrix("gptq", weight, Codec(bits, group), factor_of(x))
    assert not torch.equal(correct.codes, q.codes)


def test_parameters_that_require_gradients_are_taken() -> None:
    x = correlated_inputs(99, 64).requires_grad_()
    weight = torch.nn.Parameter(random_weight(4, 64))
    for name in QUANTIZERS:
        q = quantize_matrix(name, weight, Codec(1, 64), factor_of(x))
        assert not q.scales.requires_grad and not q.dequantize().requires_grad


def test_sign_is_the_mean_magnitude_and_one_bit_only() -> None:
    weight = random_weight(5, 64)
    q = quantize_matrix("sign", weight, Codec(1, 64))
    mean = weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(q.dequantize(), weight.sign() * mean, rtol=0.005, atol=0)
    with pytest.raises(InputError, match="1-bit"):
        quantize_matrix("sign", weight, Codec(2, 64))


# Grids


def grid_error(block: Tensor, chosen: grid.Grid, codec: Codec, weight: Tensor) -> Tensor:
    _, value = on_grid(block.double(), chosen.scale.double(), chosen.zero.double(), codec.levels)
    return weight.double() @ (block.double() - value).square()


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0])
def test_searched_grid_is_never_worse_than_min_max(bits: int, shift: float) -> None:
    codec = Codec(bits, 64)
    block = random_weight(64, 200).pow(3) + shift
    weight = torch.rand(64, generator=torch.Generator().manual_seed(5)).pow(4) + 1e-4
    searched = grid_error(block, grid.search(block, codec, weight), codec, weight)
    spanned = grid_error(block, grid.min_max(block, codec), codec, weight)
    assert (searched <= spanned * (1 + 1e-4)).all()
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
    torch.testing.assert_close(q.dequantize(), torch.full((3, 64), value), rtol=0.01, atol=0)


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


# What is refused


def test_errors() -> None:
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


def test_needs_hessian() -> None:
    assert {name: needs_hessian(name) for name in QUANTIZERS} == {
        "gptq": True,
        "gptq-released": True,
        "rtn": False,
        "sign": False,
    }
