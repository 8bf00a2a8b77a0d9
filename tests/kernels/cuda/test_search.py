"""The path search for cards under the emulator, against the search in PyTorch operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.compress import compress
from moepress.format.codec import TRELLIS_BITS, Codec
from moepress.kernels import trellis
from moepress.kernels.cuda.launch import LAUNCHERS, Launcher
from moepress.kernels.cuda.search import available
from moepress.kernels.trellis import code_matrix
from moepress.rounding.expert import AtOnce
from moepress.rounding.factor import Factor
from moepress.rounding.hessian import Hessian
from moepress.rounding.methods import viterbi
from moepress.rounding.methods.trellis import Unrounded, quantize_together
from moepress.rounding.rotation import rotate, rotate_back
from tests.conftest import small_recipe
from tests.kernels.cuda.emulate import launch, needs_compiler
from tests.rounding.alone import quantize_trellis

pytestmark = needs_compiler
LAUNCHES: list[str] = []


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulator runs the search for tensors on the CPU, on a card of one multiprocessor."""

    def run(kernel: str, *given: object) -> None:
        LAUNCHES.append(kernel)
        launch(kernel, *given)  # type: ignore[arg-type]

    LAUNCHES.clear()
    monkeypatch.setitem(LAUNCHERS, "cpu", lambda device: Launcher(run, 1))
    available.cache_clear()
    yield
    available.cache_clear()


def targets(rows: int, bits: float) -> dict[str, Tensor]:
    """Targets [8, rows]: weights, ties, and what makes differences and costs saturate."""
    generator = torch.Generator().manual_seed(int(2 * bits))
    normal = torch.randn(8, rows, generator=generator)
    return {
        "weights": normal * 90,
        "wide": normal * 90 * 10 ** torch.rand(8, rows, generator=generator),
        "far": torch.where(normal < 0, -1e9, 1e9),
        "ties": (normal * 2).round() * (128 / viterbi.UNITS[bits]),
        "zero": torch.zeros(8, rows),
    }


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_paths_are_those_of_the_definition(bits: float, card: None) -> None:
    for name, target in targets(192, bits).items():
        assert viterbi.search(target, bits).equal(viterbi.search_plainly(target, bits)), name
    assert set(LAUNCHES) == {"moepress_viterbi_search"}


def test_paths_longer_than_a_run(card: None) -> None:
    rows = 64 * (viterbi.RUN // 16 + 1)
    target = torch.randn(8, rows, generator=torch.Generator().manual_seed(0)) * 90
    for bits in (3, 1.5):
        assert viterbi.search(target, bits).equal(viterbi.search_plainly(target, bits))


def test_many_matrices_at_a_time(card: None) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = [3, 1, 3.5, 2]
    target = torch.randn(4, 16, 128, generator=generator) * 90
    feedback = torch.randn(4, 16, 128, generator=generator) * 20
    left, errors = target.clone(), feedback.clone()
    branches = torch.zeros(4, 16, 128, dtype=torch.uint8)
    viterbi.round_together(left, errors, branches, bits, 8)
    assert LAUNCHES == ["moepress_viterbi_search"]
    assert (
        errors[:, :8].equal(feedback[:, :8])
        and left[:, :8].equal(target[:, :8])
        and not branches[:, :8].any()
    )
    for number, width in enumerate(bits):
        wanted = viterbi.search_plainly(target[number, 8:] + feedback[number, 8:], width)
        assert branches[number, 8:].equal(wanted)
        values = code_matrix(wanted.T.contiguous(), width).T
        assert errors[number, 8:].equal(target[number, 8:] - values)
        wanted = target[number, 8:] + feedback[number, 8:] - values
        torch.testing.assert_close(left[number, 8:], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32), (5, 7, 96), (2, 4096), (3, 14336)])
def test_rotation(dtype: torch.dtype, shape: tuple[int, ...], card: None) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert rotate(x).equal(trellis.rotate(x))
    assert set(LAUNCHES) == {"moepress_rotation"}
    weight = x.float()
    assert rotate_back(weight).equal(trellis.rotate_back(weight))


def test_rounding_together_equals_rounding_alone(
    card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def factor() -> Factor:
        hessian = Hessian(32, "cpu")
        hessian.add(torch.randn(64, 32, generator=generator))
        return hessian.factor(0.1)

    given = [
        Unrounded(torch.randn(96, 32, generator=generator), Codec(bits, 32, "trellis"), one)
        for bits, one in ((2, factor()), (4, None), (1, factor()))
    ]
    together = quantize_together(given)
    assert LAUNCHES.count("moepress_viterbi_search") == 4
    monkeypatch.delitem(LAUNCHERS, "cpu")
    available.cache_clear()
    for matrix, one in zip(together, given, strict=True):
        alone = quantize_trellis(*one[:3])
        assert matrix.branches.equal(alone.branches) and matrix.scales.equal(alone.scales)


def test_a_whole_compression(
    card: None,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    recipe = small_recipe(
        text_file, "default", bits=2.0, expert_bits=(2,), linear_bits=(8,), sensitivity="none"
    )
    emulated = compress(model_folder(), tmp_path / "emulated", recipe)
    assert set(LAUNCHES) == {"moepress_viterbi_search", "moepress_rotation", "moepress_values"}
    monkeypatch.delitem(LAUNCHERS, "cpu")
    available.cache_clear()
    usual = compress(model_folder(), tmp_path / "usual", recipe)
    for file in usual.glob("*.safetensors"):
        assert file.read_bytes() == (emulated / file.name).read_bytes()


def test_experts_in_groups(
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    """A card rounds several experts at a time, to as many widths as are asked for."""
    recipe = small_recipe(
        text_file, "default", bits=2.0, expert_bits=(1, 3), linear_bits=(8,), sensitivity="none"
    )
    made = []
    for number, group in enumerate((AtOnce(1, 1), AtOnce(3, 3), AtOnce(3, 2))):
        for stage in ("score", "quantize"):
            module = importlib.import_module(f"moepress.{stage}")
            monkeypatch.setattr(module, "experts_at_once", lambda *_, group=group, **__: group)
        made.append(compress(model_folder(), tmp_path / str(number), recipe))
    for file in made[0].glob("*.safetensors"):
        for other in made[1:]:
            assert file.read_bytes() == (other / file.name).read_bytes()
