"""Experts divided between a card and the CPU: the sum of both halves is the undivided result."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.format.codec import PackedSpec
from moepress.kernels import backends
from moepress.kernels.divided import DividedExperts, packed_experts
from moepress.kernels.expert_shards import keep_experts
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts, set_activation_bits
from tests.kernels.cuda import emulate
from tests.kernels.cuda.conftest import emulated as emulated
from tests.kernels.cuda.test_ops import random_packed

EXPERTS, HIDDEN, INNER = 5, 128, 96
WIDTHS = {"int": (1, 2, 0, 4, 3), "trellis": (1, 2.5, 0, 1.5, 3)}


def whole_experts(family: str, gate: Gate, biases: bool = False) -> PackedExperts:
    spec = PackedSpec(WIDTHS[family], 32, family)
    module = PackedExperts(EXPERTS, HIDDEN, INNER, spec, spec, gate, biases, biases)
    for parameter, (rows, cols) in zip(
        (module.first_proj, module.down_proj), module.shapes, strict=True
    ):
        packed = [
            random_packed(rows, cols, spec.codec(e), e) for e in range(EXPERTS) if spec.bits[e]
        ]
        parameter.copy_(torch.cat(packed))
    if biases:
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            nn.init.normal_(module.get_parameter(name))
    return module.requires_grad_(False)


def divided(module: PackedExperts, card: set[int]) -> DividedExperts:
    halves = copy.deepcopy(module), copy.deepcopy(module)
    keep_experts(halves[0], card)
    keep_experts(halves[1], set(range(EXPERTS)) - card)
    return DividedExperts(*halves)


def choices(tokens: int, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs; indexes of no expert, and of the one that is left out, are among the choices."""
    chance = torch.Generator().manual_seed(tokens)
    index = torch.randint(-1, EXPERTS + 1, (tokens, k), generator=chance)
    hidden = torch.randn(tokens, HIDDEN, generator=chance)
    return hidden, index, torch.rand(tokens, k, generator=chance)


@pytest.mark.parametrize("card", [{0, 3}, {1}, {0, 1, 3, 4}, set()])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("family", ["int", "trellis"])
def test_both_halves_together_are_the_whole(family: str, biases: bool, card: set[int]) -> None:
    module = whole_experts(family, Gate("silu"), biases)
    both = divided(module, card)
    assert both.left_out == module.left_out == (2,)
    for tokens in (1, 40):
        given = choices(tokens)
        exact = module(*given)
        torch.testing.assert_close(
            both(*given), exact, rtol=0, atol=2e-6 * float(exact.abs().max())
        )
    hidden, index, weights = given
    of_card = torch.isin(index, torch.tensor([*card], dtype=torch.int64))
    alone = both(hidden, index.masked_fill(~of_card, -1), weights)  # the host has nothing to do
    assert torch.equal(alone, both.card(*given))


@emulate.needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("family", ["int", "trellis"])
def test_the_kernels_of_a_card_compute_their_half(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's half in the emulator, the other one by the kernels of the CPU."""
    module = whole_experts(family, Gate("silu"), biases=True)
    both, on_cpu = divided(module, {0, 3}), backends.BACKENDS
    card = dataclasses.replace(
        on_cpu["cuda"], name="card", rank=-1, device_types=("cpu",), refuses=lambda device: None
    )
    monkeypatch.setitem(backends.BACKENDS, "card", card)
    compute, calls = both.card._compute, []

    def emulated_card(*given: Tensor) -> Tensor:
        with backends.only("card"):
            calls.append(kernels.backends.backend_for(torch.device("cpu")).name)
            return compute(*given)

    monkeypatch.setattr(both.card, "_compute", emulated_card)
    for tokens in (1, 12):  # fewer than 8 of an expert: CPUs round no weights to bytes
        given = choices(tokens)
        exact = module(*given)
        assert (both(*given) - exact).norm() <= 2e-3 * exact.norm()
    assert calls == ["card", "card"]


def test_it_moves_and_casts_like_other_modules() -> None:
    both = divided(whole_experts("int", Gate("silu"), biases=True), {0, 3})
    hidden, index, weights = choices(4)
    exact = both(hidden, index, weights)
    half = nn.Sequential(both).to(torch.bfloat16)
    y = both(hidden.bfloat16(), index, weights)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.05 * exact.norm()
    assert list(packed_experts(half)) == ["0"]
    set_activation_bits(half, 16)
    assert both.card.activation_bits == both.host.activation_bits == 16
    with torch.device("meta"):
        alone = PackedExperts(2, 64, 32, *[PackedSpec((2, 2), 32)] * 2, Gate("silu"))
    assert packed_experts(alone) == {"": alone}
    half.to("meta")
    assert both.card.first_proj.is_meta and both.host.down_proj.is_meta is False


class Half(nn.Module):
    """A half of experts that logs its calls."""

    def __init__(self, name: str, log: list[str], left_out: tuple[int, ...]) -> None:
        super().__init__()
        self.num_experts, self.left_out, self.name, self.log = 2, left_out, name, log

    def forward(self, *given: Any) -> Any:
        self.log.append(self.name)
        return Activation("sum", self.log)


class Activation:
    """A tensor on a card that is not there: it logs its copies."""

    device = torch.device("cuda")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def to(self, device: Any, non_blocking: bool) -> Any:
        assert non_blocking
        self.log.append(f"{self.name} to {torch.device(device).type}")
        return torch.tensor([[1]]) if self.name == "index" else self

    def __add__(self, other: object) -> str:
        return "both"


def test_the_card_starts_before_the_cpu_and_the_cpu_waits_for_the_copies_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    event = SimpleNamespace(synchronize=lambda: log.append("wait"))

    def record_event() -> Any:
        log.append("record")
        return event

    stream = SimpleNamespace(record_event=record_event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    both = DividedExperts(Half("card", log, (1,)), Half("host", log, (0,)))  # type: ignore[arg-type]
    given = [Activation(name, log) for name in ("hidden", "index", "weights")]
    assert both(*given) == "both"
    copies = ["hidden to cpu", "index to cpu", "weights to cpu"]
    assert log == [*copies, "record", "card", "wait", "host", "sum to cuda"]
