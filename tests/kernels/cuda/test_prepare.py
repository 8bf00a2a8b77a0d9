"""The kernels that are compiled when a model is loaded to a card are those that it launches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moepress import kernels
from moepress.format.codec import Codec, PackedSpec
from moepress.kernels import Gate
from moepress.kernels.cuda import compiler, launch, small
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear
from moepress.kernels.prepare import prepare

GATES = {"plain": (Gate("silu"), False), "biased": (Gate("silu"), True), "none": (
    Gate("relu2", gated=False), False)}  # fmt: skip


@pytest.fixture
def told(emulated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """The kernels that were launched, and those that were prepared, where the CPU is a card."""
    told: dict[str, set[str]] = {"launched": set(), "prepared": set()}
    real = launch.launcher_for(torch.device("cpu")).launch

    def run(kernel: str, *given: Any) -> None:
        told["launched"].add(kernel)
        real(kernel, *given)

    def keep(names: Iterable[str]) -> None:
        told["prepared"] |= set(names)

    launcher = launch.Launcher(run, 8, keep)
    monkeypatch.setitem(launch.LAUNCHERS, "cpu", lambda device: launcher)
    backend = kernels.BACKENDS["cuda"]
    everywhere = replace(backend, rank=99, device_types=(), refuses=lambda device: None)
    kernels.register_backend(everywhere)
    yield told
    kernels.register_backend(backend)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["int", "trellis"])
def test_a_model_launches_what_was_prepared(
    family: str, gate: str, told: dict[str, set[str]]
) -> None:
    function, biased = GATES[gate]
    spec = PackedSpec((2, 3), 32, family)
    model = nn.ModuleDict({
        "embed": PackedEmbedding(20, 64, Codec(4, 32)),
        "linear": PackedLinear(64, 32, Codec(4, 32, family)),
        "experts": PackedExperts(2, 64, 32, spec, spec, function, biased, biased),
    })  # fmt: skip
    prepare(model)
    for tokens in (2, 40):
        x = model["embed"](torch.arange(tokens) % 20)
        model["linear"](x)
        index = torch.arange(tokens)[:, None] % 2
        model["experts"](x, index, torch.ones(tokens, 1))
    assert told["launched"]
    programs = {(launch.source_of(k), launch.defines_of(k)) for k in told["launched"]}
    assert programs == {(launch.source_of(k), launch.defines_of(k)) for k in told["prepared"]}


def test_a_model_that_generates_may_be_captured(told: dict[str, set[str]]) -> None:
    class Generating(nn.ModuleDict):
        def generate(self) -> None: ...

    parts = {
        "linear": PackedLinear(64, 32, Codec(4, 64, "trellis")),
        "biased": PackedLinear(64, 32, Codec(4, 32, "trellis"), bias=True),
        "scalar": PackedLinear(64, 32, Codec(4, 32)),
    }
    prepare(nn.ModuleDict(parts))
    alone = set(told["prepared"])
    prepare(Generating(parts))
    of_all = {*small.KERNELS, "moepress_route_small"}
    assert told["prepared"] - alone == {*of_all, "moepress_trellis_decode_several_g64_p1"}
    told["prepared"].clear()
    prepare(Generating({"linear": nn.Linear(4, 4)}))
    assert not told["prepared"]


@pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
def test_programs_are_compiled_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path))
    names: Sequence[str] = ("combine", "embedding", "drop")
    compiler.compile_all([(name, ()) for name in names], (9, 0))
    monkeypatch.setattr(compiler, "_compile", None)
    for name in names:
        assert compiler.compiled(name, (9, 0))[:4] == b"\x7fELF"
