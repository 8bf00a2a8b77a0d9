"""Routers of few tokens, emulated, against kernels/router.py.

Experts are compared by what they count for in the choice: where that is equal up to the rounding of
an exponential, either expert may be chosen.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels import router
from moepress.kernels.cuda import router as routing
from moepress.kernels.cuda.router import kernel_of, route, takes
from moepress.kernels.router import Formula
from tests.kernels.cuda import emulate

pytestmark = [emulate.needs_compiler, pytest.mark.usefixtures("emulated")]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALF = {"product_dtype": BF16, "logits_dtype": BF16}
WHOLE = HALF | {"score_dtype": BF16, "weights_dtype": BF16}  # in 16 bits throughout
FORMULAS = {
    "mixtral": Formula("softmax", True, **HALF),
    "qwen3_moe": Formula("softmax", True, **HALF, weights_dtype=BF16),
    "olmoe": Formula("softmax", product_dtype=F16, logits_dtype=F16, weights_dtype=F16),
    "deepseek_v2": Formula("softmax", scale=16.0, groups=4, kept_groups=2, group_best=1),
    "deepseek_v3": Formula("sigmoid", True, 1e-20, 2.5, groups=4, kept_groups=2),
    "mistral4": Formula("softmax", True, 1e-20, 1.5, 4, 3, **WHOLE),
    "gpt_oss": Formula("chosen", **WHOLE),
    "granitemoe": Formula("chosen", product_dtype=BF16, weights_dtype=BF16),
    "lfm2_moe": Formula("sigmoid", True, 1e-6, **WHOLE),
    "deepseek_v4": Formula("sqrtsoftplus", True, 1e-20, 1.5),
    "deepseek_v4 in 16 bits": Formula("sqrtsoftplus", True, 1e-20, 1.5, **WHOLE),
}
BIASED = {"gpt_oss"}
CORRECTED = {"deepseek_v3", "lfm2_moe", "deepseek_v4", "deepseek_v4 in 16 bits"}
SHAPES = {  # tokens, experts, columns, chosen
    "one token, 8 experts": (1, 8, 256, 2),
    "one token, few columns": (1, 8, 8, 1),
    "one token, two small blocks": (1, 12, 1200, 4),
    "one token, many blocks": (1, 136, 1032, 8),
    "4 tokens": (4, 8, 520, 2),
    "5 tokens": (5, 36, 264, 6),
    "3 tokens, one block": (3, 1, 64, 1),
    "16 tokens": (16, 64, 128, 8),
    "17 tokens, all experts": (17, 20, 64, 20),
    "one token, 1024 experts": (1, 1024, 72, 32),
}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, correction."""
    generator = torch.Generator().manual_seed(seed)
    tokens, experts, columns, _ = shape
    hidden = torch.randn(tokens, columns, generator=generator)
    weight = torch.randn(experts, columns, generator=generator) * 2 * columns**-0.5
    bias, correction = torch.randn(2, experts, generator=generator)
    return hidden.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype), 0.2 * correction


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    given = hidden, weight, bias, correction, top_k, formula
    assert routing.takes(*given)
    logits, weights, index = route(*given)
    expected = router.route(*given)
    for found, wanted in zip((logits, weights, index), expected, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert found.is_contiguous()
    step = torch.finfo(formula.product_dtype).eps
    torch.testing.assert_close(logits.float(), expected[0].float(), rtol=step, atol=3e-6)
    assert torch.equal(logits.to(formula.product_dtype), logits)

    # The rest from the logits that were found: a rounding of them may change the choice.
    scores = router.scores_of(logits, formula)
    choice = router.choices(scores, correction, formula)
    best = choice.sort(dim=-1, descending=True).values[:, :top_k].float()
    close = 4 * torch.finfo(formula.score_dtype).eps
    assert all(len(set(row)) == top_k for row in index.tolist())
    torch.testing.assert_close(choice.gather(1, index).float(), best, rtol=close, atol=1e-7)
    weight_of = router.choose(logits, correction, top_k, formula)[0]
    close = 4 * max(torch.finfo(d).eps for d in (formula.score_dtype, formula.weights_dtype))
    if correction is None:
        torch.testing.assert_close(weights, weight_of, rtol=close, atol=1e-7)
    else:  # those of experts that are worth the same differ
        same = (index == router.choose(logits, correction, top_k, formula)[1]).all(1)
        assert same.float().mean() > 0.7
        torch.testing.assert_close(weights[same], weight_of[same], rtol=close, atol=1e-7)
    return logits, weights, index


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_and_shapes(name: str, shape: str) -> None:
    formula = FORMULAS[name]
    _, experts, _, top_k = SHAPES[shape]
    if experts % formula.groups:
        formula = replace(formula, groups=1, kept_groups=1)
    if formula.groups > 1 and top_k > experts // formula.groups * formula.kept_groups:
        top_k = experts // 4
    hidden, weight, bias, correction = inputs(SHAPES[shape], BF16, BF16)
    given = bias if name in BIASED else None, correction if name in CORRECTED else None
    check(hidden, weight, *given, top_k, formula)


@pytest.mark.parametrize("weight_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("experts", [8, 40])
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, experts: int) -> None:
    shape = tokens, experts, 2064, 4
    hidden, weight, bias, correction = inputs(shape, dtype, weight_dtype)
    formula = Formula("sigmoid", True, product_dtype=dtype, logits_dtype=dtype)
    check(hidden, weight, bias, correction.to(weight_dtype), 4, formula)


def whole_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight with such logits [T, E], exactly, T <= 8."""
    hidden = torch.eye(len(logits), 8)
    weight = torch.zeros(logits.shape[1], 8)
    weight[:, : len(logits)] = logits.T
    return hidden, weight


def test_of_equal_ones_the_first_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3, 3, 2, 3, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    for tokens in (1, 2):
        found = route(*whole_logits(logits[:tokens]), None, None, 5, Formula("softmax"))
        assert torch.equal(found[0], logits[:tokens])
        assert found[2].tolist() == [[1, 2, 4, 3, 5], [0, 1, 2, 3, 4]][:tokens]
    wide = torch.zeros(1, 100)
    wide[0, [97, 65, 33, 1]] = 1
    found = route(*whole_logits(wide), None, None, 6, Formula("chosen"))
    assert found[2].tolist() == [[1, 33, 65, 97, 0, 2]]
    zeros = torch.tensor([[-1e-9, 1e-9, -1.0, 1e-9, -1e-9, -2.0, -3.0, -4.0]])
    rounded = Formula("chosen", product_dtype=F16)  # to zeros, two of them negative
    found = route(*whole_logits(zeros), None, None, 6, rounded)
    assert found[2].tolist() == [[0, 1, 3, 4, 2, 5]]


def test_groups_of_equal_worth() -> None:
    """The sum of the best two counts, and experts outside of the kept groups do not."""
    logits = torch.tensor([[5.0, -9, 3, 3, 4, 4, 4, 4]])
    formula = Formula("chosen", groups=4, kept_groups=2)
    assert route(*whole_logits(logits), None, None, 4, formula)[2].tolist() == [[4, 5, 6, 7]]
    formula = Formula("chosen", groups=4, kept_groups=2, group_best=1)
    assert route(*whole_logits(logits), None, None, 4, formula)[2].tolist() == [[0, 4, 5, 1]]
    lone = Formula("chosen", groups=8, kept_groups=3)  # one expert each
    assert route(*whole_logits(logits), None, None, 3, lone)[2].tolist() == [[0, 4, 5]]


def test_a_correction_changes_the_choice_alone() -> None:
    logits = torch.tensor([[4.0, 3, 2, 1, 0, 0, 0, 0]])
    correction = torch.tensor([-1.0, 0, 0, 0, 0, 0, 0, 2])
    formula = Formula("sigmoid", scale=2.0)
    _, weights, index = route(*whole_logits(logits), None, correction, 2, formula)
    assert index.tolist() == [[7, 1]]
    torch.testing.assert_close(weights, 2 * torch.sigmoid(torch.tensor([[0.0, 3.0]])))


def test_epsilon() -> None:
    """It counts where scores are small, and a sum of zeros gives zeros."""
    logits = torch.tensor([[-3.0, -4, -5, -6, -7, -8, -9, -10], [-200.0] * 8])
    formula = Formula("sigmoid", True, 0.1)
    _, weights, _ = route(*whole_logits(logits), None, None, 2, formula)
    scores = torch.sigmoid(logits[:, :2])
    torch.testing.assert_close(weights, scores / (scores.sum(1, keepdim=True) + 0.1))
    assert not weights[1].any()


def test_odd_logits() -> None:
    """Infinite ones, and NaN, which torch sorts before all."""
    logits = torch.tensor([[1.0, torch.inf, -torch.inf, 2, 0, 0, 0, 0]])
    found = route(*whole_logits(logits.nan_to_num(0, 0, 0)), logits[0], None, 3, Formula("chosen"))
    assert found[2].tolist() == [[1, 3, 0]]
    for nan in (torch.nan, -torch.nan):
        logits[0, 6] = nan
        given = *whole_logits(logits.nan_to_num(0, 0, 0)), logits[0], None, 3, Formula("chosen")
        found = route(*given)
        assert found[2].tolist() == [[6, 1, 3]] == router.route(*given)[2].tolist()
        assert found[1].isnan().all()


def test_launches_leave_their_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same counter again and again, with other numbers of blocks."""
    monkeypatch.setattr(routing, "_launches", iter([7] * 100))
    formula = FORMULAS["qwen3_moe"]
    for shape in [*SHAPES.values()] * 2:
        hidden, weight, _, _ = inputs(shape, BF16, BF16)
        check(hidden, weight, None, None, shape[3], formula)


def test_misplaced_and_strided_inputs() -> None:
    hidden, weight, bias, correction = inputs((3, 16, 64, 4), BF16, BF16)
    formula = Formula("sigmoid", True, product_dtype=BF16, logits_dtype=BF16)
    expected = route(hidden, weight, bias, correction, 4, formula)
    odd = torch.cat([weight.new_zeros(3), weight.flatten()])[3:].view(weight.shape)
    turned = hidden.T.contiguous().T
    strided = torch.stack([correction, correction], 1)[:, 0]
    found = route(turned, weight, bias, strided, 4, formula)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    for other in (odd, weight.T.contiguous().T):  # a copy would be read before it is there
        assert not takes(hidden, other, bias, correction, 4, formula)
        assert torch.equal(route(hidden, other, bias, correction, 4, formula)[2], expected[2])
    assert not takes(hidden, weight, torch.stack([bias, bias], 1)[:, 0], correction, 4, formula)


def test_kernels_by_size() -> None:
    assert kernel_of(1, 8, 4096, True, 132) == ("small", (1, 1, 1), 1024)
    assert kernel_of(1, 8, 4096, False, 132) == ("one", (8, 1, 1), 256)
    assert kernel_of(1, 128, 2048, True, 132) == ("one", (128, 1, 1), 256)
    assert kernel_of(4, 8, 4096, True, 132) == ("few", (8, 1, 1), 256)
    assert kernel_of(16, 256, 7168, True, 132) == ("tile", (64, 4, 1), 256)


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    formula = Formula("softmax")
    for shape, dtype, top_k in (
        ((2, 8, 60, 2), F32, 2),
        ((2, 8, 64, 2), torch.float64, 2),
        ((129, 8, 64, 2), F32, 2),
        ((1, 1032, 8, 2), F32, 2),
        ((1, 64, 8, 33), F32, 33),
    ):
        hidden, weight, _, _ = inputs(shape, dtype, dtype)
        given = hidden, weight, None, None, top_k, formula
        assert not routing.takes(*given)
        for found, expected in zip(route(*given), router.route(*given), strict=True):
            assert torch.equal(found, expected)


def test_no_token() -> None:
    hidden, weight, _, _ = inputs((0, 8, 64, 2), BF16, BF16)
    logits, weights, index = route(hidden, weight, None, None, 2, Formula("softmax"))
    assert (logits.shape, weights.shape, index.shape) == ((0, 8), (0, 2), (0, 2))


def test_the_op() -> None:
    hidden, weight, bias, correction = inputs((3, 8, 64, 2), F32, F32)
    formula = Formula("sigmoid", True, 1e-20, 2.0, 2, 1, weights_dtype=BF16)
    fields = tuple(asdict(formula).values())
    torch.library.opcheck(kernels.route.op, (hidden, weight, bias, correction, 2, *fields))
    with kernels.only("reference"):
        found = kernels.route(hidden, weight, bias, correction, 2, *fields)
    expected = router.route(hidden, weight, bias, correction, 2, formula)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)

    def refused(given: tuple[Any, ...], top_k: int = 2, **changes: Any) -> bool:
        with pytest.raises(InputError):
            kernels.route(*given, top_k, **{**asdict(formula), **changes})
        return True

    given = hidden, weight, bias, correction
    assert refused((hidden[0], weight, bias, correction))
    assert refused((hidden, weight[:, :32], bias, correction))
    assert refused((hidden, weight, bias[:3], correction))
    assert refused((hidden, weight, bias, correction[None]))
    assert refused(given, top_k=5)
    assert refused(given, top_k=0)
    assert refused(given, groups=3)
    assert refused(given, kept_groups=3)
    assert refused(given, group_best=3)
    assert refused(given, score="tanh")
    assert refused(given, score="chosen")
