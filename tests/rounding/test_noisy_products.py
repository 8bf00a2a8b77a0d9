"""Products with drawn errors are, in the mean, those of matrices with drawn errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import NumericalError
from moepress.rounding import noisy_products as module
from moepress.rounding.factor import Factor, block_feedback
from moepress.rounding.hessian import Hessian
from moepress.rounding.kept_tokens import KeptTokens
from moepress.rounding.noise import code_error, draw, drawn_errors, noisy_weights
from moepress.rounding.noisy_products import NoisyProducts, add_noise, noisy_products
from moepress.rounding.rotation import rotate

ROWS, COLUMNS, TOKENS = 384, 256, 600
WIDTHS = (1, 2, 3, 4)


def inputs(tokens: int = TOKENS) -> Tensor:
    """[T, COLUMNS] tokens whose columns are correlated."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, COLUMNS)
    basis, _ = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator))
    x = torch.randn(tokens, COLUMNS, generator=generator) * spectrum @ basis
    return x / x.square().mean().sqrt()


def random_weight(rows: int = ROWS) -> Tensor:
    """Rows of different sizes."""
    generator = torch.Generator().manual_seed(1)
    size = 0.5 + torch.rand(rows, 1, generator=generator)
    return torch.randn(rows, COLUMNS, generator=generator) * COLUMNS**-0.5 * size


def factor_of(x: Tensor) -> Factor:
    hessian = Hessian(COLUMNS, "cpu")
    hessian.add(rotate(x))
    return hessian.factor(0.01)


def products_of(products: NoisyProducts, weight: Tensor, x: Tensor, seed: int) -> Tensor:
    mean, deviation = products.of(x)
    y = F.linear(mean, weight)
    noise = draw((len(weight), module.SHARED), seed, "outputs")
    add_noise(y, deviation, noise * weight.square().mean(1).sqrt())
    return y


def by_weights(
    weight: Tensor, x: Tensor, factor: Factor, cost: Callable[[Tensor], Tensor], seed: int,
    larger: Tensor | None,
) -> Tensor:  # fmt: skip
    """[W] costs with drawn weights: the oracle."""
    noise = draw(weight.shape, seed, "weights")
    noisy = noisy_weights(weight, WIDTHS, factor, noise, larger=larger)
    return torch.stack([cost(F.linear(x, w)) for w in noisy])


def by_products(
    weight: Tensor, x: Tensor, factor: Factor, cost: Callable[[Tensor], Tensor], seed: int,
    larger: Tensor | None,
) -> Tensor:  # fmt: skip
    noise = draw((module.rows_of_sample(len(weight)), COLUMNS), seed, "sample")
    drawn = noisy_products(weight, WIDTHS, factor, noise, larger)
    return torch.stack([cost(products_of(one, weight, x, seed)) for one in drawn])


@pytest.mark.parametrize("larger", [None, 1.3])
def test_costs_are_those_of_drawn_weights(
    larger: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the products, and of outputs behind a gate and another matrix, which mixes rows."""
    monkeypatch.setattr(module, "ROWS", 256)
    weight, x = random_weight(), inputs()
    factor = factor_of(x)
    down = torch.randn(64, ROWS // 2, generator=torch.Generator().manual_seed(2))

    def output(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, 1)
        return F.linear(F.silu(4 * gate) * up, down)

    def of_products(y: Tensor) -> Tensor:
        return (y - x @ weight.T).square().sum()

    def of_outputs(y: Tensor) -> Tensor:
        return (output(y) - output(x @ weight.T)).square().sum()

    by = None if larger is None else torch.tensor(larger)
    for cost in (of_products, of_outputs):
        exact, found = (
            torch.stack([way(weight, x, factor, cost, seed, by) for seed in range(4)]).mean(0)
            for way in (by_weights, by_products)
        )
        assert (found / exact - 1).abs().max() < 0.04, found / exact


def test_mean_and_deviation_are_those_of_the_errors() -> None:
    """Of a single token, over rows that are nothing but Gaussian numbers and without a fit."""
    x, error = inputs(), code_error(2, 4096)
    factor = factor_of(x)
    weight = torch.randn(4096, COLUMNS, generator=torch.Generator().manual_seed(3))
    target = rotate(weight).T.contiguous()
    feedback = block_feedback(factor.dense())
    errors, _ = drawn_errors(target, feedback, error, draw(weight.shape, 0, "x"))
    noise = draw((512, COLUMNS), 0, "x")
    (products,) = noisy_products(weight, [2], factor, noise)
    token = x[:3]
    p = torch.linalg.solve_triangular(
        products.feedback, rotate(token).T, upper=True, unitriangular=True
    )
    mean = error * target.T @ p
    left = rotate(token) @ errors - mean.T  # noise alone
    _, deviation = products.of(token)
    fitted = products.shrunk / error  # the share of the noise that fits leave
    assert left.square().mean(1).sqrt() == pytest.approx((deviation / fitted), rel=0.03)
    slope = (left * mean.T).sum(1) / mean.square().sum(0)
    assert slope.abs().max() < 0.1


def test_few_tokens_and_many_give_the_same_products() -> None:
    x, weight = inputs(48), random_weight()
    kept = KeptTokens(COLUMNS, len(x), "cpu", False)
    kept.add(rotate(x), None)
    noise = draw((ROWS, COLUMNS), 0, "x")
    hessian = Hessian(COLUMNS, "cpu")
    hessian.add(rotate(x))
    found = [
        next(noisy_products(weight, [2], factor, noise)).of(x)
        for factor in (kept.factor(0.1), hessian.factor(0.1))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_noise_is_shared_by_tokens_far_apart() -> None:
    y = torch.zeros(600, 5, dtype=torch.bfloat16)
    noise = torch.randn(module.SHARED, 5)
    deviation = torch.rand(600)
    add_noise(y, deviation, noise)
    expected = noise[torch.arange(600) % module.SHARED] * deviation[:, None]
    assert torch.equal(y, expected.bfloat16())


def test_zero_rows_and_broken_weights() -> None:
    x, weight = inputs(), random_weight()
    factor = factor_of(x)
    noise = draw((ROWS, COLUMNS), 0, "x")
    weight[5] = 0
    (products,) = noisy_products(weight, [1], factor, noise)
    assert (products_of(products, weight, x, 0)[:, 5] == 0).all()
    (nothing,) = noisy_products(torch.zeros_like(weight), [1], factor, noise)
    mean, deviation = nothing.of(x)
    assert mean.isfinite().all() and (deviation == 0).all()
    weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinity"):
        list(noisy_products(weight, [1], factor, noise))
