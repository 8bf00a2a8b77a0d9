"""A few random cases of every op (fuzz.py), and that a wrong result is reported."""

from __future__ import annotations

import pytest

from moepress.kernels.cuda import embedding
from tests.kernels.cuda import emulate, fuzz
from tests.kernels.cuda.fuzzing import products
from tests.kernels.cuda.fuzzing.draw import Draw

pytestmark = emulate.needs_compiler


@pytest.mark.parametrize("op", fuzz.CASES)
def test_random_cases(op: str) -> None:
    cases = 1 if op in fuzz.RARE else 5
    assert [line for case in range(cases) if (line := fuzz.run(op, 0, case))] == []


def test_cases_depend_on_the_seed_and_the_number_alone() -> None:
    first, again, other = (Draw("linear", 1, case) for case in (7, 7, 8))
    numbers = [(d.tokens(), d.normal(3).tolist()) for d in (first, again, other)]
    assert numbers[0] == numbers[1] != numbers[2] and first.parameters == again.parameters


def test_a_wrong_number_is_reported_with_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: object) -> object:
        y = embedding(*given)  # type: ignore[arg-type]
        if y.numel():
            y.view(-1)[-1] += 1
        return y

    assert fuzz.run("embedding", 3, 0) is None
    monkeypatch.setattr(products.cuda, "embedding", wrong)
    lines = [fuzz.run("embedding", 3, case) for case in range(5)]
    found = next(line for line in lines if line is not None)
    assert found.startswith("--only embedding --seed 3 --case ") and "AssertionError" in found
    assert "rows=" in found and "\n" not in found
