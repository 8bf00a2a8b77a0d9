"""The router in C++, on every instruction set of this machine, against kernels/router.py."""

from __future__ import annotations

import itertools
import math
import random
from ctypes import byref
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moepress import kernels
from moepress.errors import InputError
from moepress.kernels import backend_for, cpu, router
from moepress.kernels.cpu import interface
from moepress.kernels.cpu import route as cpu_route
from moepress.kernels.cpu.route import route
from moepress.kernels.router import FLOATS, SCORES, Formula

MISSING = cpu.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"the library {MISSING}")

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
Outputs = tuple[Tensor, Tensor, Tensor]


def of_dtypes(formula: Formula, *dtypes: torch.dtype) -> Formula:
    names = ("product_dtype", "logits_dtype", "score_dtype", "weights_dtype")
    return replace(formula, **dict(zip(names, dtypes, strict=True)))


def normal(*shape: int, dtype: torch.dtype = SINGLE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def check_logits(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, formula: Formula
) -> None:
    """Within the rounding of float32 sums of 64 parts, and of the dtypes."""
    assert logits.dtype == formula.logits_dtype
    x, w = hidden.double(), weight.double()
    exact, sizes = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    far = (hidden.shape[1] / 64 + 9) * 2**-24 * sizes
    for dtype in (formula.product_dtype, formula.logits_dtype):
        info = torch.finfo(dtype)
        far = far + info.eps / 2 * (exact.abs() + far) + info.smallest_normal * info.eps
    assert ((logits.double() - exact).abs() <= far).all()
    if formula.logits_dtype == SINGLE:
        assert torch.equal(logits, logits.to(formula.product_dtype).float())


def check_choice(found: Outputs, correction: Tensor | None, formula: Formula) -> float:
    """Compare with the choice from the very logits; the share of indices that are the same, or
    of weights, where scores have 16 bits.

    Exponentials differ in their last places: of two scores that are equal but for that, either
    may come first.
    """
    logits, weights, index = found
    k = index.shape[1]
    wanted, order = router.choose(logits, correction, k, formula)
    assert (weights.dtype, weights.shape) == (wanted.dtype, wanted.shape)
    assert (index.dtype, index.shape) == (order.dtype, order.shape)
    # Equal groups differ so too: groups do not count here.
    choice = router.choices(
        router.scores_of(logits, formula), correction, replace(formula, groups=1)
    )
    eps = torch.finfo(choice.dtype).eps
    apart = choice.gather(1, index).double() - choice.gather(1, order).double()
    size = choice.gather(1, order).double().abs()
    if correction is not None:
        size = size + correction.double()[order].abs()
    assert (apart.abs() <= 4 * eps * size).all()
    info = torch.finfo(formula.weights_dtype)
    rtol = 4 * max(info.eps, torch.finfo(formula.score_dtype).eps)
    atol = formula.scale * info.smallest_normal
    torch.testing.assert_close(weights.double(), wanted.double(), rtol=rtol, atol=atol)
    same = index == order
    if formula.score_dtype != SINGLE:
        same &= weights == wanted
    return float(same.double().mean())


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    k: int,
    formula: Formula,
) -> float:
    found = route(hidden, weight, bias, correction, k, formula)
    check_logits(found[0], hidden, weight, bias, formula)
    return check_choice(found, correction, formula)


GROUPS = [(1, 1, 2), (4, 2, 2), (3, 2, 1), (12, 7, 2), (2, 1, 1)]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("score", SCORES)
def test_every_formula(isa: str, score: str, groups: tuple[int, int, int]) -> None:
    """Scores in each dtype, normalised or not, corrected or not."""
    weight, same = normal(48, 64) / 4, []
    for dtype, normalise, corrected, spread in itertools.product(
        FLOATS, (False, True), (None, *FLOATS), (1, 30)
    ):
        if score == "chosen" and corrected is not None:
            continue
        formula = Formula(score, normalise, 0.1, 1.7, *groups, score_dtype=dtype)
        correction = None if corrected is None else 0.3 * normal(48, dtype=corrected)
        k = min(6, 48 // groups[0] * groups[1])
        same.append(check(normal(9, 64), weight * spread, None, correction, k, formula))
    assert sum(same) / len(same) > 0.995


@pytest.mark.parametrize("seed", range(4))
def test_every_dtype(isa: str, seed: int) -> None:
    draw, same = random.Random(seed), []
    for product, returned, scored, weights in itertools.product(FLOATS, repeat=4):
        given = draw.choices(FLOATS, k=4)
        formula = of_dtypes(
            Formula(draw.choice(SCORES), draw.random() < 0.5, 1e-20, draw.choice((1.0, 2.5))),
            product, returned, scored, weights,
        )  # fmt: skip
        correction = None if formula.score == "chosen" else normal(40, dtype=given[0]) / 5
        bias = normal(40, dtype=given[1], seed=1) if draw.random() < 0.5 else None
        hidden, weight = normal(3, 72, dtype=given[2]), normal(40, 72, dtype=given[3]) / 8
        same.append(check(hidden, weight, bias, correction, 5, formula))
    assert sum(same) / len(same) > 0.995


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sizes(isa: str, dtype: torch.dtype) -> None:
    """Columns that are no whole step, experts that are no whole range of a thread."""
    formula = Formula("softmax", product_dtype=dtype)
    for experts, cols in itertools.product((1, 5, 16, 37, 130), (1, 8, 31, 64, 65, 100, 1056)):
        for tokens in (1, 3):
            hidden, weight = normal(tokens, cols, dtype=dtype), normal(experts, cols, dtype=dtype)
            check(hidden, weight / cols**0.5, None, None, min(4, experts), formula)


def test_many_experts_and_choices(isa: str) -> None:
    formula = Formula("sigmoid", True, 1e-20, 2.5, 8, 4, 2)
    assert check(normal(4, 64), normal(512, 64) / 8, None, normal(512) / 9, 256, formula) > 0.99
    assert check(normal(16, 64), normal(512, 64) / 8, None, None, 1, Formula("softmax")) > 0.99


# Equal and nearly equal scores


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_of_equal_experts_the_first(isa: str, score: str, dtype: torch.dtype) -> None:
    """Each expert three times, in mixed order; then all the same; then zeros.

    torch's own scores of equal logits may differ: the last of a row are computed one by one.
    """
    weight = normal(12, 40, dtype=dtype).repeat(3, 1)[shuffled(36)]
    for rows in (weight, weight[:1].expand(36, -1).contiguous(), torch.zeros_like(weight)):
        formula = of_dtypes(Formula(score), *[dtype] * 4)
        for groups in (Formula("").groups, 4):
            given = replace(formula, groups=groups, kept_groups=min(2, groups))
            found = route(normal(5, 40, dtype=dtype), rows, None, None, 9, given)
            same = check_choice(found, None, given)
            assert score != "chosen" or same == 1
            equal = found[0].gather(1, found[2])
            ties = equal[:, 1:] == equal[:, :-1]
            assert ties.any()
            assert (found[2][:, 1:] > found[2][:, :-1])[ties].all()


def exact_logits(numbers: Tensor, product: torch.dtype = SINGLE) -> tuple[Tensor, Tensor]:
    """Hidden states [1, 1] and a weight [E, 1] with these logits."""
    return torch.ones(1, 1), numbers[:, None].to(product)


def test_the_last_place_counts(isa: str) -> None:
    numbers = 1 + torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3.0]) * 2**-23
    for sign in (1, -1):
        found = route(*exact_logits(sign * numbers), None, None, 6, Formula("chosen"))
        assert torch.equal(found[0][0], sign * numbers)
        wanted = (sign * numbers).sort(descending=True, stable=True).indices[:6]
        assert torch.equal(found[2][0], wanted)


def test_minus_zero_equals_zero(isa: str) -> None:
    """Logits that float16 rounds to -0."""
    numbers = torch.tensor([-1.0, 0.0, -1e-9, 1e-9, 0.0])
    formula = of_dtypes(Formula("chosen"), HALF, HALF, HALF, HALF)
    logits, _, index = route(*exact_logits(numbers), None, None, 4, formula)
    assert logits.signbit().tolist() == [[True, False, True, False, False]]
    assert index.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("score", SCORES)
def test_far_logits(isa: str, score: str) -> None:
    """Scores down to the smallest numbers and 0, up to where they are equal."""
    numbers = torch.arange(-130.0, 130.0, 7.0)[shuffled(38)]
    numbers[3], numbers[9] = -torch.inf, -1e30
    found = route(*exact_logits(numbers), None, None, 38, Formula(score))
    wanted = router.choose(found[0], None, 38, Formula(score))
    assert torch.equal(found[2], wanted[1])
    torch.testing.assert_close(found[1], wanted[0], rtol=2e-6, atol=1e-44)


# Numbers


def test_every_float16_is_read(isa: str) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(HALF)
    formula = Formula("chosen")
    for dtype in (HALF, BRAIN):
        given = numbers.view(dtype)
        logits, _, index = route(torch.ones(1, 1), given[:, None], None, None, 1, formula)
        finite = given.isfinite()
        assert torch.equal(logits[0][finite], given.float()[finite])
        assert torch.equal(logits[0].isnan(), given.isnan())
        assert torch.equal(logits[0].isinf(), given.isinf())
        assert given[index[0, 0]].isnan()


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_rounding_as_torch(isa: str, dtype: torch.dtype) -> None:
    """Floats of any bits, and those halfway between two numbers and beside them."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = ((every[1:] + every[:-1]) / 2).view(torch.int32)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32)
    numbers = torch.cat((bits, between - 1, between, between + 1)).view(SINGLE)
    formula = of_dtypes(Formula("chosen"), dtype, dtype, SINGLE, SINGLE)
    logits = route(torch.ones(1, 1), numbers[:, None], None, None, 1, formula)[0][0]
    # A product is added to +0, which makes a -0 of it 0.
    torch.testing.assert_close(logits, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(isa: str, bad: float, score: str) -> None:
    """In hidden states, in one row of the weight, in a bias, in a correction."""
    for dtype, groups in itertools.product(FLOATS, (1, 4)):
        formula = of_dtypes(Formula(score, True, 0.0, 1.0, groups, min(groups, 2)), *[dtype] * 4)
        for place in range(4):
            hidden, weight = normal(4, 40, dtype=dtype), normal(16, 40, dtype=dtype)
            bias, correction = normal(16, dtype=dtype), normal(16, dtype=dtype) / 9
            (hidden[1], weight[5], bias[6:8], correction[3:5])[place].fill_(bad)
            last = None if score == "chosen" else correction
            logits, weights, index = route(hidden, weight, bias, last, 5, formula)
            wanted, order = router.choose(logits, last, 5, formula)
            assert torch.equal(index, order)
            torch.testing.assert_close(
                weights, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True
            )


# The same bits


def large_call(score: str, dtype: torch.dtype, tokens: int) -> Outputs:
    """A call that is worth several threads."""
    hidden, weight = normal(tokens, 1100, dtype=dtype), normal(130, 1100, dtype=dtype) / 30
    formula = of_dtypes(Formula(score, True), *[dtype] * 4)
    return route(hidden, weight, None, None, 8, formula)


LARGE = list(itertools.product(SCORES, FLOATS, (1, 16)))


@pytest.mark.parametrize("call", LARGE, ids=str)
def test_the_number_of_threads_changes_nothing(
    isa: str, call: tuple[str, torch.dtype, int]
) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(large_call(*call))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("call", LARGE, ids=str)
def test_every_instruction_set_gives_the_same_bits(
    isa: str, call: tuple[str, torch.dtype, int]
) -> None:
    found = large_call(*call)
    cpu.use("portable")
    for one, other in zip(found, large_call(*call), strict=True):
        assert torch.equal(one, other)


def test_a_token_does_not_depend_on_the_others(isa: str) -> None:
    hidden, weight, formula = normal(16, 1100), normal(130, 1100) / 30, Formula("softmax")
    together = route(hidden, weight, None, None, 8, formula)
    for t in range(16):
        alone = route(hidden[t : t + 1], weight, None, None, 8, formula)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[t])


# Calls


def test_one_call_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else but memory for the results."""
    calls: list[tuple[object, ...]] = []
    plain = interface.call

    def counted(*arguments: object) -> None:
        calls.append(arguments)
        plain(*arguments)  # type: ignore[arg-type]

    names: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, *rest: Any) -> Any:
            names.append(str(func))
            args, kwargs = rest[1:]
            return func(*args, **kwargs)

    monkeypatch.setattr(interface, "call", counted)
    hidden, weight, vector = normal(1, 64, dtype=BRAIN), normal(32, 64, dtype=BRAIN), normal(32)
    with Seen():
        for correction in (None, vector):
            route(hidden, weight, None, correction, 4, Formula("sigmoid", True))
    assert names == ["aten.new_empty.default"] * 6
    assert [name for name, *_ in calls] == ["moepress_route"] * 2
    assert calls[0][13]._obj is calls[1][13]._obj  # type: ignore[attr-defined]


def test_what_the_library_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "call", lambda *_: pytest.fail("the library is called"))
    double, formula = torch.float64, Formula("softmax", True)
    hidden, weight, vector = normal(3, 64), normal(32, 64), normal(32)
    calls: list[tuple[Any, ...]] = [
        (hidden.double(), weight, None, None, formula),
        (hidden, weight.double(), None, None, formula),
        (hidden, weight, vector.double(), None, formula),
        (hidden, weight, None, vector.double(), formula),
        *((hidden, weight, None, None, replace(formula, **{name: double}))
          for name in ("product_dtype", "logits_dtype", "score_dtype", "weights_dtype")),
        (normal(64, 3).T, weight, None, None, formula),
        (hidden, normal(64, 32).T, None, None, formula),
        (hidden, weight, normal(64)[::2], None, formula),
        (normal(cpu_route.MOST_TOKENS + 1, 64), weight, None, None, formula),
    ]  # fmt: skip
    for *tensors, given in calls:
        found, wanted = (f(*tensors, 4, given) for f in (route, router.route))
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


def test_empty_calls(isa: str) -> None:
    formula = Formula("softmax", True, weights_dtype=BRAIN)
    logits, weights, index = route(normal(0, 64), normal(32, 64), None, None, 4, formula)
    assert (logits.shape, weights.shape, index.shape) == ((0, 32), (0, 4), (0, 4))
    logits, weights, index = route(normal(2, 0), normal(32, 0), normal(32), None, 4, formula)
    assert torch.equal(logits, normal(32).expand(2, -1))


def test_as_a_torch_op() -> None:
    assert backend_for(torch.device("cpu")).route is route
    formula = Formula("sigmoid", True, 1e-20, 2.5, 4, 2)
    args = normal(2, 64), normal(32, 64) / 8, None, normal(32) / 9, 4
    found = kernels.route(*args, *astuple(formula))
    for one, other in zip(found, route(*args, formula), strict=True):
        assert torch.equal(one, other)
    torch.library.opcheck(kernels.route.op, (*args, *astuple(formula)))


WRONG: dict[str, tuple[int, int | None]] = {  # place of an argument, and what is wrong there
    "hidden's numbers": (1, 3), "tokens": (2, -1), "columns": (3, -1), "weight's numbers": (5, -1),
    "experts": (6, 0), "bias's numbers": (8, 7), "correction's numbers": (10, 3), "none": (11, 0),
    "too many": (11, 17), "threads": (13, 0),
}  # fmt: skip
WRONG_FIELDS = {
    "score": (-1, 4), "group_best": (0, 3), "product": (-1, 3), "logits": (-1, 3),
    "scores": (-1, 3), "weights": (-1, 3), "groups": (0, -1, 3, 33, 64), "kept_groups": (0, 5, -1),
}  # fmt: skip


def test_wrong_arguments_are_refused(isa: str) -> None:
    x, weight, vector = normal(2, 64), normal(32, 64), normal(32)
    logits, weights, index = torch.empty(2, 32), torch.empty(2, 32), torch.empty(2, 32).long()
    pointers = [t.data_ptr() for t in (x, weight, vector, logits, weights, index)]

    def call(place: int = -1, value: int | None = None, **fields: int) -> None:
        settings = cpu_route._Formula(1, 0, 2, 0, 0, 0, 0, 0.0, 1.0, 4, 2)
        for name, number in fields.items():
            setattr(settings, name, number)
        arguments: list[object] = [
            pointers[0], 0, 2, 64, pointers[1], 0, 32, pointers[2], 0, pointers[2], 0, 16,
            byref(settings), 1, *pointers[3:],
        ]  # fmt: skip
        if place >= 0:
            arguments[place] = value
        interface.call("moepress_route", *arguments)

    call()
    for place, value in WRONG.values():
        with pytest.raises(InputError, match="a size is out of range"):
            call(place, value)
    for name, values in WRONG_FIELDS.items():
        for number in values:
            with pytest.raises(InputError, match="a size is out of range"):
                call(**{name: number})
    with pytest.raises(InputError, match="a size is out of range"):
        call(score=3)  # by logits, with a correction
