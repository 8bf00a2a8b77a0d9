"""Counted operations are those of hand counts, and those that PyTorch runs."""

from __future__ import annotations

import pytest
import torch

from moepress.format.codec import Codec, codec_for
from moepress.rounding import sweep as sweep_module
from moepress.rounding.channel_scale import own_variance
from moepress.rounding.correction import Correction, sums_moved
from moepress.rounding.hessian import Hessian
from moepress.rounding.inputs import Inputs
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.noise import draw, noisy_weights
from moepress.rounding.noisy_products import noisy_products
from moepress.rounding.sweep import runs, sweep
from moepress.rounding.token_factor import few
from moepress.workload import operations as op
from tests.workload.flops import FlopCount


def test_product() -> None:
    assert op.product(3, 4, 5) == {"product": 120}
    assert op.product(3, 4, 5, "float32") == {"float32": 120}


def test_works_add_up() -> None:
    one = op.product(1, 2, 3)
    assert op.total([one, op.times(2, one), op.Work({"copy": 7})]) == {"product": 36, "copy": 7}


def test_hessian_by_hand() -> None:
    """Column slices of 1024, each from the diagonal on."""
    flops = 2 * 10 * (1024 * 1500 + 476 * 476)
    assert op.hessian(10, 1500) == {"float32": flops, "copy": 30000}


def test_factor_by_hand() -> None:
    assert op.factor(30)["float32"] == 9000
    assert op.factor(30)["cholesky"] == 900


def test_rotation_by_hand() -> None:
    """Runs of 32 columns take five steps; the signs take one more."""
    assert op.rotation(7, 96) == {"rotate": 7 * 96 * 6}


def test_sweep_by_hand() -> None:
    """Four leaves of 8 columns: one product of 16 x 16, then two of 8 x 8."""
    expected = {"float32": 2 * 5 * (16 * 16 + 2 * 8 * 8), "copy": 5 * (32 + 16 + 16)}
    assert op.sweep(5, 32, 8) == expected | {"call": 3 * op.CALLS_OF_SWEEP}


@pytest.mark.parametrize(("rows", "steps"), [(64, 16 + 2 * 16), (100, 32 + 64), (640, 160 + 128)])
def test_search_by_hand(rows: int, steps: int) -> None:
    """32 paths for each eight columns, of 16 steps a slab, and the seam of up to 2 x 64 steps."""
    assert op.search(rows, 24, 3) == {"search 3": 3 * 32 * steps}


def test_load_by_hand() -> None:
    assert op.load(100, 2) == {"load": 100, "read": 200}


@pytest.mark.parametrize("cols", [64, 1100])
def test_hessian(cols: int) -> None:
    with FlopCount() as counted:
        Hessian(cols, "cpu").add(torch.randn(50, cols))
    assert op.hessian(50, cols)["float32"] == counted.flops


def test_own_variance() -> None:
    with FlopCount() as counted:
        own_variance(torch.randn(50, 64))
    inverse = 64**3  # a factorization, and the inverse of it, which FlopCount does not see
    assert op.own_variance(50, 64)["float32"] == counted.flops + inverse


@pytest.mark.parametrize("cols", [64, 72, 200])
def test_sweep(cols: int) -> None:
    buffer, feedback = torch.zeros(cols, 6), torch.eye(cols)
    with FlopCount() as counted:
        sweep(buffer, feedback, 0, cols, 8, lambda start, stop: None)
    assert op.sweep(6, cols, 8)["float32"] == counted.flops


def test_sweep_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (op, sweep_module):
        monkeypatch.setattr(module, "COLUMNS_IN_16_BITS", 32)
    op._sweep.cache_clear()
    buffer, feedback = torch.zeros(72, 6), torch.eye(72).bfloat16()
    with FlopCount() as counted:
        sweep(buffer, feedback, 0, 72, 8, lambda start, stop: None)
    work = op.sweep(6, 72, 8, in_16_bits=True)
    op._sweep.cache_clear()
    assert work["product"] == 2 * 6 * 32 * 40  # 72 columns are cut into 32 and 40
    assert work["product"] + work["float32"] == counted.flops


@pytest.mark.parametrize("family", ["trellis", "int"])
def test_rounding(family: str) -> None:
    weight = torch.randn(128, 128)
    hessian = Hessian(128, "cpu")
    hessian.add(torch.randn(300, 128))
    factor = hessian.factor(0.1)
    with FlopCount() as counted:
        quantize_matrix("gptq", weight, Codec(2, 32, family), factor)
    if family == "trellis":
        assert op.round_trellis(128, 128, 2, feedback=True)["float32"] == counted.flops
    else:  # inside a group there are small products, which are part of the rate of "int"
        counted_by_us = op.round_scalar(128, 128, 2, 32, feedback=True)["float32"]
        assert 0.5 * counted.flops < counted_by_us <= counted.flops


def test_drawing() -> None:
    weight = torch.randn(64, 128)
    hessian = Hessian(128, "cpu")
    hessian.add(torch.randn(300, 128))
    factor, noise = hessian.factor(0.1), draw((64, 128), 0, "x")
    list(noisy_weights(weight, (1, 2, 3), factor, noise))  # measures the error of codes once
    with FlopCount() as counted:
        list(noisy_weights(weight, (1, 2, 3), factor, noise))
    assert op.draw_errors(64, 128, 3)["float32"] == counted.flops


def test_drawing_at_the_products() -> None:
    weight, x = torch.randn(700, 128), torch.randn(90, 128)
    hessian = Hessian(128, "cpu")
    hessian.add(torch.randn(300, 128))
    factor, noise = hessian.factor(0.1), draw((512, 128), 0, "x")
    list(noisy_products(weight, (1, 2, 3), factor, noise))  # measures the error of codes once
    with FlopCount() as counted:
        for products in noisy_products(weight, (1, 2, 3), factor, noise):
            products.of(x)
    deviations = 3 * 2 * 90 * 128  # products with a vector, which FlopCount does not see
    energies = 3 * 2 * 512 * 128  # of the sample's rows: not worth an operation of ours
    found = op.draw_products(700, 128, 90, 3)["float32"]
    assert found - deviations == counted.flops - energies


@pytest.mark.parametrize("rows", [32, 40, 100])
def test_correction(rows: int) -> None:
    x, original, weight = torch.randn(90, 64), torch.randn(90, 64), torch.randn(rows, 64)
    hessian = Hessian(64, "cpu")
    correction = Correction(64, "cpu", weight if sums_moved(rows, 64) else None)
    with FlopCount() as gathering:
        hessian.add(x)
        correction.add(x, original)
    assert op.inputs(90, 64, rotates=False, corrects=True, rows=rows)["float32"] == gathering.flops
    with FlopCount() as correcting:
        correction.corrected(weight, hessian.copy(), 0.1, 0.5)
    counted = op.corrected(rows, 64, rotates=False, alone=True) - op.factor(64)
    assert counted["float32"] == pytest.approx(correcting.flops)
    factor = hessian.factor(0.1)
    with FlopCount() as gaining:
        correction.gain(weight, weight, factor)
    assert op.gain(rows, 64, rotates=False)["float32"] == gaining.flops


@pytest.mark.parametrize(("tokens", "cols"), [(16, 64), (100, 608), (280, 608)])
def test_kept_tokens(tokens: int, cols: int) -> None:
    """16 and 100 tokens make a factor of tokens, 280 a dense one."""
    weight = torch.randn(64, cols)
    inputs = Inputs(cols, "cpu", "int", True, weight, tokens)
    inputs.add(torch.randn(tokens, cols), torch.randn(tokens, cols))
    with FlopCount() as correcting:
        inputs.corrected(weight, 0.1, 0.5)
    counted = op.corrected(64, cols, False, True, tokens)["float32"] - tokens**3 / 3
    solved = 2 * tokens**2 * min(64, cols)  # cholesky_solve, which FlopCount does not see
    assert counted - solved == pytest.approx(correcting.flops)
    with FlopCount() as factoring:
        factor = inputs.factor(0.1)
    inside = sum((run.stop - run.start) ** 3 / 3 for run in runs(cols))
    inside = inside if few(tokens, cols) else cols**3 / 3
    assert op.factor(cols, tokens)["float32"] - inside == pytest.approx(factoring.flops)
    codec = codec_for(2, cols, 128, "trellis")
    with FlopCount() as rounding:
        rounded = quantize_matrix("gptq", weight, codec, factor)
    counted = op.round_trellis(64, cols, 2, True, tokens)["float32"]
    assert counted == pytest.approx(rounding.flops, rel=0.02)  # V of the blocks inside of runs
    with FlopCount() as gaining:
        inputs.rescaled(rounded, weight, factor)
    assert op.gain(64, cols, False, tokens)["float32"] == gaining.flops
