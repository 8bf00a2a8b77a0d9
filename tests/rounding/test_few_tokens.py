"""Few tokens: factors, sweeps and corrections by way of tokens, against those of sums [K, K]."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from moepress.errors import NumericalError
from moepress.format.codec import Codec
from moepress.rounding.correction import Correction
from moepress.rounding.factor import DenseFactor, Factor
from moepress.rounding.hessian import Hessian
from moepress.rounding.inputs import Inputs
from moepress.rounding.kept_tokens import KeptTokens
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.sweep import TokenFeedback, sweep
from moepress.rounding.token_factor import TokenFactor, factor_of_tokens, few

UNIT = 2.0**-24
DAMPING = 0.3
SIZES = [(1, 32), (16, 64), (60, 256), (70, 288), (100, 608)]  # T, K: runs of 256 columns


def some_tokens(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """[T, K] of few directions, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(max(1, tokens // 2), columns, generator=generator)
    strong = torch.randn(tokens, len(mixing), generator=generator) @ mixing
    return strong + torch.randn(tokens, columns, generator=generator)


def both(tokens: int, columns: int) -> tuple[TokenFactor, DenseFactor]:
    """A factor of tokens, and the factor of the same Hessian from its sums."""
    x = some_tokens(tokens, columns)
    hessian = Hessian(columns, "cpu")
    hessian.add(x)
    return factor_of_tokens(x, DAMPING), hessian.factor(DAMPING)


@pytest.mark.parametrize(("tokens", "columns"), SIZES)
def test_factor_is_that_of_the_hessian(tokens: int, columns: int) -> None:
    """R D R^T is the damped Hessian within roundings: see `assert_factor_of` in test_methods."""
    x = some_tokens(tokens, columns)
    factor = factor_of_tokens(x, DAMPING)
    hessian = x.double().T @ x.double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(columns)
    r = factor.dense().double()
    rebuilt = (r * factor.curvature.double()) @ r.T
    root = hessian.diagonal().sqrt()
    bound = (tokens + columns + 10) * UNIT * root[:, None] * root
    assert ((rebuilt - hessian).abs() <= bound).all()
    assert torch.equal(r, r.triu()) and (r.diagonal() == 1).all()
    assert factor.damping == DAMPING


@pytest.mark.parametrize(("tokens", "columns"), SIZES)
def test_products_are_those_of_the_dense_factor(tokens: int, columns: int) -> None:
    factor, dense = both(tokens, columns)
    w = torch.randn(columns, 24, generator=torch.Generator().manual_seed(1))
    expected = dense.feedback.double().T @ w.double()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for one in (factor, dense):
            found = torch.cat(list(one.products(w, dtype)))
            assert found.dtype == dtype
            error = (found.double() - expected).norm() / expected.norm()
            assert error < tolerance
    for size in (8, 32):
        found = factor.diagonal_blocks(size)
        torch.testing.assert_close(found, dense.diagonal_blocks(size), rtol=1e-4, atol=1e-5)
        start = size * (columns // size - 1)
        torch.testing.assert_close(found[-1], dense.feedback[start:, start:], rtol=1e-4, atol=1e-5)


def swept(
    factor: Factor, columns: int, leaf: int, dtype: torch.dtype, target: Tensor
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Errors [K, n] of rounding to whole numbers with feedback; the columns in order."""
    feedback = factor.by_block(dtype) if leaf == 8 else factor.by_column()
    buffer, order = torch.zeros_like(target), []

    def visit(start: int, stop: int) -> None:
        order.append((start, stop))
        adjusted = target[start:stop] + buffer[start:stop]
        # The error is a smooth function of what is received, so factors that differ by roundings
        # leave errors that do.
        buffer[start:stop] = 0.1 * torch.sin(3 * adjusted)

    sweep(buffer, feedback, 0, columns, leaf, visit)
    return buffer, order


@pytest.mark.parametrize(("tokens", "columns"), SIZES[1:])
@pytest.mark.parametrize("leaf", [8, 32])
def test_sweeps_are_those_of_the_dense_factor(tokens: int, columns: int, leaf: int) -> None:
    """Of R by columns of a group, of V by column blocks."""
    factor, dense = both(tokens, columns)
    target = torch.randn(columns, 40, generator=torch.Generator().manual_seed(2))
    found, order = swept(factor, columns, leaf, torch.float32, target)
    expected, expected_order = swept(dense, columns, leaf, torch.float32, target)
    assert order == expected_order == [(k, k + leaf) for k in range(0, columns, leaf)]
    assert (expected - 0.1 * torch.sin(3 * target)).norm() > 0.1 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if leaf == 32:  # the definition: column k has got R^T of all errors before
        feedback = factor.dense()
        for start, stop in order:
            received = feedback[:start, start:stop].T @ found[:start]
            again = 0.1 * torch.sin(3 * (target[start:stop] + received))
            torch.testing.assert_close(found[start:stop], again, rtol=1e-3, atol=1e-4)


def test_sweep_in_16_bits() -> None:
    """Products of 300 tokens and runs of 256 columns are of bfloat16 numbers."""
    factor, _ = both(300, 1200)
    target = torch.randn(1200, 40, generator=torch.Generator().manual_seed(2))
    exact, _ = swept(factor, 1200, 8, torch.float32, target)
    narrow, _ = swept(factor, 1200, 8, torch.bfloat16, target)
    assert 0 < (narrow - exact).norm() / exact.norm() < 0.02


def test_gptq_with_tokens_has_the_errors_of_gptq() -> None:
    """Losses under the Hessian agree, for scalar and for trellis codes."""
    factor, dense = both(60, 256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    root = (dense.feedback * dense.curvature.sqrt()).double()
    for codec in (Codec(2, 128), Codec(2, 128, "trellis")):
        one, other = (quantize_matrix("gptq", weight, codec, f) for f in (factor, dense))
        losses = []
        for matrix in (one, other):
            error = weight - matrix.dequantize()
            losses.append(float((error.double() @ root).square().sum()))
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_no_token_is_the_identity() -> None:
    for x in (torch.empty(0, 320), torch.zeros(4, 320)):
        factor = factor_of_tokens(x, DAMPING)
        assert torch.equal(factor.dense(), torch.eye(320))
        feedback = factor.by_block()
        assert isinstance(feedback, TokenFeedback)
        assert not feedback.y.any() and all(v.equal(torch.eye(len(v))) for v in feedback.inner)
        assert torch.equal(factor.curvature, torch.ones(320))


def test_magnitude_of_inputs_does_not_matter() -> None:
    """Powers of two scale exactly."""
    x = (some_tokens(16, 64) * 16).round() / 16
    plain, scaled = factor_of_tokens(x, DAMPING), factor_of_tokens(x * 2.0**40, DAMPING)
    assert torch.equal(scaled.dense(), plain.dense())
    assert torch.equal(scaled.curvature, plain.curvature * 2.0**80)


def test_bad_tokens_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    x = some_tokens(16, 64)
    x[3, 5] = torch.inf
    with pytest.raises(NumericalError, match="Hessian holds NaN"):
        factor_of_tokens(x, DAMPING)
    x = torch.ones(16, 64)
    with caplog.at_level(logging.WARNING, "moepress.rounding.hessian"):
        factor = factor_of_tokens(x, 1e-9)  # rank 1, and a damping below the roundings
    assert factor.damping > 1e-9 and len(caplog.records) == 1
    with pytest.raises(NumericalError, match="not positive definite"):
        factor_of_tokens(x, 1e-20)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize("rows", [24, 120])
def test_correction_and_gain_are_those_of_sums(weighted: bool, tokens: int, rows: int) -> None:
    x = some_tokens(tokens, 96)
    original = x + 0.3 * some_tokens(tokens, 96, seed=1)
    count = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) if weighted else None
    w = torch.randn(rows, 96, generator=torch.Generator().manual_seed(5))
    kept = KeptTokens(96, tokens, "cpu", corrects=True)
    hessian, correction = Hessian(96, "cpu"), Correction(96, "cpu")
    for part in (slice(0, 5), slice(5, None)):
        each = None if count is None else count[part]
        kept.add(x[part].bfloat16(), original[part].bfloat16(), each)
        hessian.add(x[part].bfloat16(), each)
        correction.add(x[part].bfloat16(), original[part].bfloat16(), each)
    assert kept.tokens == pytest.approx(hessian.tokens)
    expected = correction.corrected(w, hessian.copy(), 0.01, 0.5)
    assert (expected - w).norm() > 0.01 * w.norm()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        found = kept.corrected(w, 0.01, 0.5, dtype)
        assert (found - expected).norm() < tolerance * (expected - w).norm()
    rounded = w.round()
    dense = hessian.factor(1e-3)
    gain = correction.gain(w, rounded, dense)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        assert kept.gain(w, rounded, dense, dtype) == pytest.approx(gain, rel=tolerance)
    assert kept.gain(w, torch.zeros_like(w), dense, torch.float32) == 1


@pytest.mark.parametrize("family", ["int", "trellis"])
@pytest.mark.parametrize("tokens", [20, 60])
def test_inputs_keep_few_tokens(family: str, tokens: int) -> None:
    """With 20 of 128 tokens the factor is of tokens, with 60 it is dense."""
    x = some_tokens(tokens, 128)
    original = x + 0.3 * some_tokens(tokens, 128, seed=1)
    count = torch.rand(tokens, generator=torch.Generator().manual_seed(6))
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(7))
    matrix = quantize_matrix("rtn", w, Codec(2, 32))
    found = []
    for known in (None, tokens):
        inputs = Inputs(128, "cpu", family, True, w, known)
        inputs.add(x, original, count)
        moved = inputs.corrected(w, 0.01, 0.5)
        factor = inputs.factor(0.01)
        assert isinstance(factor, TokenFactor) == (known == 20 and few(tokens, 128))
        rescaled = inputs.rescaled(matrix, w, factor).dequantize()
        found.append((moved, factor.dense(), factor.curvature, rescaled))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_more_tokens_than_said_are_refused() -> None:
    kept = KeptTokens(32, 4, "cpu", corrects=False)
    kept.add(some_tokens(3, 32), None)
    with pytest.raises(RuntimeError, match="expected at most 4"):
        kept.add(some_tokens(2, 32), None)
