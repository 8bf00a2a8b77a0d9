"""The self test passes on the kernels of this machine, and finds what is wrong with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moepress import self_test as module
from moepress.doctor import doctor
from moepress.errors import MoepressError
from moepress.kernels import BACKENDS, backends, cpu, reference, register_backend
from moepress.self_test import Compared, row_error, self_test

CPU = torch.device("cpu")


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", (1, 9))
    monkeypatch.setattr(module, "MOST", 9)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[backends.Backend]:
    """The reference as the backend of highest rank, which a test spoils."""
    before = dict(BACKENDS)
    yield dataclasses.replace(before["reference"], name="spoiled", rank=99)
    BACKENDS.clear()
    for one in before.values():
        register_backend(one)


def found() -> dict[str, Compared]:
    return {result.name: result for result in self_test(CPU)}


@pytest.mark.skipif(cpu.missing() is not None, reason="the C++ kernels were not built")
def test_the_kernels_of_this_cpu_are_right(fewer: None) -> None:
    results = found()
    assert [r.wrong for r in results.values()] == [()] * len(results)
    assert all(r.compared >= 3 for r in results.values())
    assert results["experts, trellis codes"].error > 0  # something else than the reference ran


def test_errors_that_a_card_tells_late_are_named() -> None:
    class Lost(Tensor):
        """What a kernel has not written: a card says so when it is read."""

        def to(self, *args: object, **options: object) -> Tensor:
            raise RuntimeError("an illegal memory access\nwas encountered")

    lost, right = torch.zeros(2, 3).as_subclass(Lost), torch.ones(2, 3)
    cases = [module._Case(name, lambda x=x: x, [], [right.clone]) for name, x in
             (("first", lost), ("second", right))]  # fmt: skip
    result = module._tested("op", iter(cases), CPU)
    assert result.compared == 2 and result.wrong == ("first: an illegal memory access",)


def test_wrong_results_are_named(fewer: None, backend: backends.Backend) -> None:
    def scaled(call: backends.ExpertsCall) -> Tensor:
        y = reference.experts(call)
        y[-1] *= 1 + 0.05 * (call.family == "int")
        return y

    def broken(*_: object) -> Tensor:
        raise RuntimeError("an illegal memory access\nwas encountered")

    register_backend(dataclasses.replace(backend, experts=scaled, embedding=broken))
    results = found()
    wrong = results["experts, int codes"]
    assert len(wrong.wrong) == wrong.compared and 0.045 < wrong.error < 0.06
    assert "1 tokens, torch.float32" in wrong.wrong[0] and "at most" in wrong.wrong[0]
    gone = results["embedding"]
    assert len(gone.wrong) == gone.compared
    assert gone.wrong[0].endswith("an illegal memory access")
    others = [r for name, r in results.items() if name not in (wrong.name, gone.name)]
    assert not any(r.wrong for r in others)


def test_one_wrong_number_of_a_large_result_is_found(
    fewer: None, backend: backends.Backend
) -> None:
    def shifted(*given: object) -> Tensor:
        y = reference.embedding(*given)  # type: ignore[arg-type]
        y.view(-1)[7] += 1e-3
        return y

    register_backend(dataclasses.replace(backend, embedding=shifted))
    result = found()["embedding"]
    assert len(result.wrong) == result.compared


def test_a_kernel_that_does_not_compile_is_a_result(fewer: None, backend: backends.Backend) -> None:
    def refused(*_: object) -> Tensor:
        raise MoepressError("NVRTC refuses linear.cu")

    register_backend(dataclasses.replace(backend, linear=refused))
    assert "NVRTC refuses" in found()["linear, int codes"].wrong[0]


def test_errors_of_rows() -> None:
    exact = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    assert row_error(exact, exact) == 0
    assert row_error(exact + torch.tensor([[0.0], [1.0]]), exact) == pytest.approx(2**0.5 / 50)
    assert row_error(exact[:1], exact) == torch.inf
    assert row_error(torch.full_like(exact, torch.nan), exact) == torch.inf
    assert row_error(exact[:0], exact[:0]) == 0


def test_the_doctor_reports_it(fewer: None, backend: backends.Backend) -> None:
    register_backend(dataclasses.replace(backend, drop=lambda *given: reference.drop(*given)[::-1]))
    checks = {check.name: check for check in doctor(kernels=True).checks}
    assert checks["drop on cpu"].state == "failed" and checks["drop on cpu"].do
    assert checks["linear, int codes on cpu"].state == "ok"
    assert not any(name.startswith("drop") for name in (c.name for c in doctor().checks))
