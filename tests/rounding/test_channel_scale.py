"""Scales of a matrix's inputs that lose least: against regressions, and against other scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moepress.rounding.channel_scale import best_scale, channel_scale, own_variance
from tests.uneven import uneven

H = 64


def correlated(tokens: int = 4000) -> Tensor:
    """Inputs [tokens, H] that tell much of each other."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(H, H, generator=generator) / H**0.5 + 0.5 * torch.eye(H)
    return torch.randn(tokens, H, generator=generator) @ mixing


def loss(energy: Tensor, variance: Tensor, scale: Tensor) -> float:
    return float((energy / scale**2).mean() * (variance * scale**2).mean())


def test_own_variance_is_what_a_regression_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepress.rounding.channel_scale.RIDGE", 0.0)
    x = correlated()
    found = own_variance(x)
    for channel in (0, 7, H - 1):
        others = torch.cat([x[:, :channel], x[:, channel + 1 :]], 1).double()
        target = x[:, channel, None].double()
        left = target - others @ torch.linalg.lstsq(others, target).solution
        assert float(found[channel]) == pytest.approx(float(left.square().mean()), rel=1e-3)


def test_own_variance_follows_the_scale_of_a_channel() -> None:
    x, scale = correlated(), uneven(H)
    for some in (x, x[:10]):  # the second are less than channels
        quotient = own_variance(some * scale) / own_variance(some)
        torch.testing.assert_close(quotient, scale**2, rtol=1e-3, atol=0)
    assert not own_variance(torch.full((5, H), torch.nan)).isfinite().any()


def test_no_scale_loses_less() -> None:
    energy, variance = uneven(H, seed=2), uneven(H, seed=3)
    scale, gain = channel_scale(energy, variance)
    least = loss(energy, variance, scale)
    assert gain == pytest.approx(1 - least / loss(energy, variance, torch.ones(H)), rel=1e-3)
    for seed in range(20):
        other = scale * uneven(H, seed=seed) ** 0.1
        assert loss(energy, variance, other) > least
    kept = float((variance * scale**2).mean() / variance.mean())
    assert kept == pytest.approx(1, rel=0.01)
    assert torch.equal(scale.bfloat16().float(), scale)


def test_rows_may_have_any_scales() -> None:
    """A large query of a small key must not choose the scales for all others, and for values."""
    weight = torch.randn(48, H, generator=torch.Generator().manual_seed(1)) * uneven(H, seed=2)
    x = correlated()
    scale, gain = best_scale([weight], [x])
    rows = torch.ones(48, 1)
    rows[3], rows[4] = 2.0**10, 2.0**-40
    for dtype in (torch.float32, torch.bfloat16):
        even = best_scale([weight.to(dtype)], [x])
        found = best_scale([torch.cat([weight * rows, torch.zeros(2, H)]).to(dtype)], [x])
        torch.testing.assert_close(found, even)
    assert gain > 0.1
    assert float(scale.log().std()) > 0.1


def test_channels_that_nothing_is_known_of_stay() -> None:
    energy, variance = uneven(H, seed=2), uneven(H, seed=3)
    energy[3] = variance[5] = 0
    variance[7] = torch.nan
    scale, gain = channel_scale(energy, variance)
    assert scale[[3, 5, 7]].tolist() == [1, 1, 1]
    assert gain > 0.1
    nothing, none = channel_scale(0 * energy, variance)
    assert torch.equal(nothing, torch.ones(H))
    assert none == 0


def test_scales_are_numbers_of_float16() -> None:
    energy = torch.tensor([1e-30, 1.0, 1.0, 1e30])
    scale, _ = channel_scale(energy, torch.ones(4))
    assert torch.equal(scale.half().float(), scale)
    assert scale.min() > 0
