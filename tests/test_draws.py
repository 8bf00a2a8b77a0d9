"""Tokens drawn from probabilities: the right frequencies, and the same tokens on every device."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

from moepress.draws import STARTS, Noise, drawn_tokens, gumbel_noise
from moepress.errors import NumericalError


def draws(log_probabilities: Tensor, seed: int) -> Tensor:
    """A token [N] for each row [N, V]."""
    noise = gumbel_noise((len(log_probabilities),), log_probabilities.shape[1], seed)
    return drawn_tokens(log_probabilities, noise.at(noise.starts))


def test_frequencies_are_the_probabilities() -> None:
    p = torch.tensor([0.4, 0.0, 0.3, 0.15, 0.1, 0.04, 0.008, 0.002])
    counts = draws(p.log().expand(100_000, -1), seed=0).bincount(minlength=len(p)).double()
    some = p > 0
    assert not counts[~some].any()
    expected = p[some].double() * (100_000 / p.double().sum())
    assert chisquare(counts[some].numpy(), expected.numpy()).pvalue > 0.01


def test_frequencies_in_a_large_vocabulary() -> None:
    """A Zipf law of 50,000 tokens, a third of it in tokens below 1/2000, counted by size."""
    p = 1 / torch.arange(3.0, 50_003, dtype=torch.float64)
    p /= p.sum()
    drawn = torch.cat([draws(p.float().log().expand(500, -1), seed) for seed in range(20)])
    edges = torch.tensor([0, 1, 3, 8, 20, 60, 200, 700, 2000, 6000, 20_000, 50_000])
    counts = torch.histogram(drawn.double(), edges.double() - 0.5).hist
    below = torch.cat([torch.zeros(1, dtype=torch.float64), p.cumsum(0)])[edges]
    assert chisquare(counts.numpy(), (below.diff() * len(drawn)).numpy()).pvalue > 0.01


def test_tokens_of_two_positions_are_independent() -> None:
    """Though all positions read the same rows of numbers."""
    p = torch.tensor([0.5, 0.3, 0.2])
    drawn = draws(p.log().expand(200_000, -1), seed=3)
    for apart in (1, 7, 512):
        pairs = (drawn[:-apart] * 3 + drawn[apart:]).bincount(minlength=9).view(3, 3)
        assert chi2_contingency(pairs.numpy()).pvalue > 0.01


def test_numbers_are_of_gumbels_law_and_depend_on_the_seed_alone() -> None:
    noise = gumbel_noise((4000, 2), 1000, seed=1)
    numbers = noise.at(noise.starts[:, 0])
    assert numbers.dtype == torch.float32 and numbers.isfinite().all()
    shares = torch.histc((-(-numbers.double()).exp()).exp(), 64, 0, 1)
    assert shares.sum() == numbers.numel() and chisquare(shares.numpy()).pvalue > 0.01
    assert numbers.max() > 14 and numbers.min() < -2.6  # of 4 million: about 15.2 and -2.7
    same, other = (gumbel_noise((4000, 2), 1000, seed) for seed in (1, 2))
    assert torch.equal(same.rows, noise.rows) and torch.equal(same.starts, noise.starts)
    assert not torch.equal(other.starts, noise.starts) and not torch.equal(other.rows, noise.rows)


def test_numbers_are_those_of_a_plain_computation() -> None:
    noise = gumbel_noise((4, 3), 50, seed=0)
    assert noise.starts.shape == (4, 3, 2) and len(noise.starts.unique()) == 24
    assert noise.starts.min() >= 0 and noise.starts.max() < STARTS and noise.rows.min() >= 0
    starts = [(0, STARTS), (5, 0), (STARTS - 1, 77)]
    first, second = noise.rows.tolist()
    expected = [
        [-math.log(-math.log1p(-((first[a + v] ^ second[b + v]) + 0.5) / 2**31)) for v in range(50)]
        for a, b in starts
    ]
    torch.testing.assert_close(
        noise.at(torch.tensor(starts)).double(), torch.tensor(expected, dtype=torch.float64),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_extreme_integers_give_finite_numbers() -> None:
    rows = torch.zeros(2, STARTS + 2, dtype=torch.int32)
    rows[0, 1] = 2**31 - 1
    low, high = Noise(rows, torch.empty(0)).at(torch.zeros(1, 2, dtype=torch.int64))[0].tolist()
    assert low == pytest.approx(32 * math.log(2)) and high == pytest.approx(
        -math.log(24 * math.log(2))
    )


@pytest.mark.parametrize("vocabulary", [2000, 100_003])
def test_other_orders_of_summation_draw_the_same_tokens(vocabulary: int) -> None:
    """Logits as two devices would compute them: products over 512 columns, summed differently."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(100, 512, generator=generator)
    head = torch.randn(vocabulary, 512, generator=generator) * 0.1
    one = states @ head.T
    parts = zip(states.split(96, 1), head.split(96, 1), strict=True)
    other = torch.stack([a @ b.T for a, b in parts]).sum(0)
    assert (one != other).float().mean() > 0.5
    first, second = (draws(logits.log_softmax(-1), seed=2) for logits in (one, other))
    assert len(first.unique()) > 50
    assert torch.equal(first, second)  # each differs with a probability of 1e-6


def test_tokens_change_no_more_than_the_predictions() -> None:
    """Predictions of bfloat16 against float32. Sums of probabilities change more."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20_000, 1000, generator=generator) * 3
    one, other = (logits.float().log_softmax(-1) for logits in (exact, exact.bfloat16()))
    differ = (draws(one, seed=0) != draws(other, seed=0)).float().mean().item()
    variation = (one.exp() - other.exp()).abs().sum(-1) / 2
    bound = (2 * variation / (1 + variation)).mean().item()
    assert 0 < differ < bound + 3 * (bound / len(exact)) ** 0.5 and bound < 0.02


def test_one_possible_token_is_drawn_whatever_the_noise() -> None:
    logits = torch.full((1000, 300), -torch.inf)
    tokens = torch.arange(1000) % 300
    logits[torch.arange(1000), tokens] = -80.0  # up to a constant
    assert torch.equal(draws(logits, seed=0), tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_without_probabilities_are_refused(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        draws(logits, seed=0)
    logits[1] = 0
    logits[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinity"):
        draws(logits, seed=0)
