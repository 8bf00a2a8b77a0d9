"""kernels/router.py, by which routers are judged, against plain Python and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.kernels.router import Formula, route

EXPERTS, COLUMNS = 12, 16


def plain(
    hidden: list[float], weight: list[list[float]], correction: list[float], k: int, f: Formula
) -> tuple[list[int], list[float]]:
    """Indices and weights of one token, number by number."""
    logits = [sum(x * w for x, w in zip(hidden, row, strict=True)) for row in weight]
    if f.score == "softmax":
        total = sum(map(math.exp, logits))
        scores = [math.exp(x) / total for x in logits]
    elif f.score == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    elif f.score == "sqrtsoftplus":
        scores = [math.sqrt(math.log1p(math.exp(x))) for x in logits]
    else:
        scores = logits
    choice = {e: s + c for e, (s, c) in enumerate(zip(scores, correction, strict=True))}
    size = len(weight) // f.groups
    groups = [range(g * size, (g + 1) * size) for g in range(f.groups)]
    worth = {
        g: sum(sorted((choice[e] for e in group), reverse=True)[: f.group_best])
        for g, group in enumerate(groups)
    }
    kept = sorted(worth, key=lambda g: -worth[g])[: f.kept_groups] if f.groups > 1 else [0]
    allowed = [e for g in sorted(kept) for e in groups[g]]
    index = sorted(allowed, key=lambda e: -choice[e])[:k]
    weights = [scores[e] for e in index]
    if f.score == "chosen":
        weights = [math.exp(x) / sum(map(math.exp, weights)) for x in weights]
    if f.normalise:
        weights = [w / (sum(weights) + f.epsilon) for w in weights]
    return index, [w * f.scale for w in weights]


@pytest.mark.parametrize("groups", [(1, 1, 2), (4, 2, 2), (3, 2, 1), (12, 7, 2)])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "chosen"])
def test_step_by_step(score: str, normalise: bool, groups: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, COLUMNS, generator=generator)
    weight = torch.randn(EXPERTS, COLUMNS, generator=generator) / 2
    correction = None
    if score != "chosen":
        correction = 0.3 * torch.randn(EXPERTS, generator=generator)
    formula = Formula(score, normalise, 0.1, 1.7, *groups)
    logits, weights, index = route(hidden, weight, None, correction, 5, formula)
    torch.testing.assert_close(logits, hidden @ weight.T)
    for token in range(len(hidden)):
        numbers = (torch.zeros(EXPERTS) if correction is None else correction).double().tolist()
        given = hidden[token].double().tolist(), weight.double().tolist(), numbers
        wanted, wanted_weights = plain(*given, 5, formula)
        assert index[token].tolist() == wanted
        torch.testing.assert_close(weights[token], torch.tensor(wanted_weights))


def test_dtypes_and_a_bias() -> None:
    """Logits are rounded once, also where they are returned in another dtype."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, COLUMNS, generator=generator).bfloat16()
    weight = torch.randn(EXPERTS, COLUMNS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator)
    exact = hidden.float() @ weight.T + bias
    half, single = torch.bfloat16, torch.float32
    for product, returned, weights_dtype in ((half, single, half), (single, single, single)):
        formula = Formula("chosen", product_dtype=product, logits_dtype=returned,
                          weights_dtype=weights_dtype)  # fmt: skip
        logits, weights, index = route(hidden, weight, bias, None, 2, formula)
        assert (logits.dtype, weights.dtype, index.dtype) == (returned, weights_dtype, torch.int64)
        torch.testing.assert_close(logits, exact.to(product).to(returned))


def test_no_tokens() -> None:
    weight, formula = torch.randn(EXPERTS, COLUMNS), Formula("softmax", groups=4, kept_groups=2)
    logits, weights, index = route(torch.empty(0, COLUMNS), weight, None, None, 3, formula)
    assert [x.shape for x in (logits, weights, index)] == [(0, EXPERTS), (0, 3), (0, 3)]


def router_of(family: str, **changes: Any) -> Any:
    """A router of transformers with 16 experts and random numbers."""
    from tests.families.models import make_model

    model: Any = make_model(family, **changes)
    return next(m for m in model.modules() if "router" in type(m).__name__.lower())


def expect(module: Any, formula: Formula, correction: Tensor | None = None) -> None:
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    found = route(hidden, module.weight, None, correction, module.top_k, formula)
    logits, weights, index = module(hidden)
    torch.testing.assert_close(found[0], logits)
    dense = torch.zeros_like(logits)
    torch.testing.assert_close(
        dense.scatter(1, found[2], found[1]), dense.scatter(1, index, weights)
    )


@torch.no_grad()
def test_routers_of_transformers() -> None:
    """Models with groups, which those of tests/hf/test_fused_router.py do not have all."""
    deepseek = router_of("deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2)
    formula = Formula("sigmoid", True, 1e-20, 2.5, 4, 2)
    expect(deepseek, formula, deepseek.e_score_correction_bias)
    limited = router_of("deepseek_v2", n_routed_experts=16, n_group=4, topk_group=2,
                        topk_method="group_limited_greedy")  # fmt: skip
    expect(limited, Formula("softmax", groups=4, kept_groups=2, group_best=1))
