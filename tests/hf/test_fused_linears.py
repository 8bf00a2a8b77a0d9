"""Linears that get the same tensor become one op, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.format.codec import Codec
from moepress.hf import fused_linears as fusing
from moepress.hf.fused_linears import fused_linears
from moepress.kernels.backends import register_backend
from moepress.kernels.matrix import PackedMatrix
from moepress.kernels.modules import PackedLinear
from tests.rounding.test_trellis import random_packed

HIDDEN = 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def for_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def linear(rows: int, bits: float = 2, group: int = 32, bias: bool = False) -> PackedLinear:
    codec = Codec(bits, group, "trellis")
    made = PackedLinear(HIDDEN, rows, codec, bias)
    made.weight = nn.Parameter(random_packed(rows, HIDDEN, codec, rows), requires_grad=False)
    return made


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(64, 4), linear(32, 3), linear(32, 2.5)
        self.o, self.biased, self.coarse = linear(64), linear(64, bias=True), linear(64, group=64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        hidden = q + torch.cat([k, v], -1)
        y: Tensor = self.o(hidden) + self.biased(hidden) + self.coarse(hidden)
        return y


@pytest.fixture
def joining() -> Iterator[None]:
    """The CPU's backend takes several matrices at once, as that of cards does."""
    plain = kernels.backend_for(CPU)

    def linears(x: Tensor, matrices: Sequence[PackedMatrix], activation_bits: int) -> Tensor:
        each = [plain.linear(x, m.weight, None, m.rows, m.codec, activation_bits) for m in matrices]
        return torch.cat(each, -1)

    register_backend(replace(plain, linears=linears))
    yield
    register_backend(plain)


def test_a_backend_that_takes_one_matrix_at_a_time_is_left_alone() -> None:
    layer = Layer()
    with fused_linears(layer, ("cpu",)):
        assert "forward" not in vars(layer.q)


@pytest.fixture
def calls(joining: None, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of the matrices of each call of the op."""
    seen: list[list[int]] = []

    original = kernels.linears

    def counted(x: Tensor, packed: Any, rows: list[int], *more: Any) -> Tensor:
        seen.append(rows)
        return original(x, packed, rows, *more)

    monkeypatch.setattr(fusing.kernels, "linears", counted)
    return seen


def test_linears_with_the_same_input_are_one_op_from_the_second_pass_on(
    calls: list[list[int]],
) -> None:
    model = nn.Sequential(Layer(), Layer())
    x, y = torch.randn(2, 1, 3, HIDDEN)
    expected = [model(x), model(y)]
    with fused_linears(model, ("cpu",)):
        assert model(x).equal(expected[0]) and not calls
        torch.testing.assert_close(model(y), expected[1])
        torch.testing.assert_close(model(x), expected[0])
    assert calls == [[64, 32, 32]] * 4
    assert "forward" not in vars(model[0].q)
    assert model(y).equal(expected[1]) and len(calls) == 4


def test_many_tokens_and_other_inputs_are_computed_one_by_one(calls: list[list[int]]) -> None:
    layer = Layer()
    x, other = torch.randn(2, 1, HIDDEN)
    with fused_linears(layer, ("cpu",)):
        layer(x)
        layer(torch.randn(17, HIDDEN))
        assert not calls
        layer.q(x)  # k and v wait for the same tensor
        assert calls == [[64, 32, 32]]
        expected = PackedLinear.forward(layer.k, other)
        assert layer.k(other).equal(expected)
        assert layer.k(x).shape == (1, 32)  # its own product, after another
    assert len(calls) == 1


def test_gradients_are_computed_as_ever(calls: list[list[int]]) -> None:
    layer = Layer()
    with fused_linears(layer, ("cpu",)):
        layer(torch.randn(1, HIDDEN))
        with torch.enable_grad():
            x = torch.randn(1, HIDDEN, requires_grad=True)
            layer(x).sum().backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
    assert not calls
