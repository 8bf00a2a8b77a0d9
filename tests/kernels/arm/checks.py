"""The C++ kernels of 64-bit ARM under emulation, against the oracles of test_cpu.py and others.

run.py runs this file: it needs a library that is compiled there. Most checks are the tests of the
kernels of this machine, with the fixture `isa` of this file: `moepress.kernels.cpu` then calls the
emulated library.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.format.codec import TRELLIS_BITS, Codec
from moepress.kernels import cpu
from moepress.rounding.methods import viterbi
from tests.kernels.arm import run
from tests.kernels.arm.emulated import EmulatedLibrary, emulated_library
from tests.kernels.test_cpu import (  # noqa: F401
    test_a_token_gets_the_same_bits_alone_and_in_any_batch,
    test_a_token_that_is_not_finite_spoils_no_other_token,
    test_an_expert_chosen_twice_counts_twice,
    test_an_index_that_is_no_expert_contributes_nothing,
    test_embedding_equals_the_reference_bit_by_bit,
    test_every_activation,
    test_experts,
    test_linear,
    test_linear_in_half_precision,
    test_one_token_that_chooses_some_experts_more_often_than_others,
    test_refusals_say_what_is_wrong,
    test_views_and_bytes_at_odd_addresses,
)
from tests.kernels.test_kernels import CODECS, make_case, random_packed
from tests.kernels.test_trellis_cpu import (  # noqa: F401
    experts_call,
    test_a_token_depends_on_nothing_else,
    test_wrong_bytes_are_refused,
)
from tests.kernels.test_trellis_cpu import (  # noqa: F401
    test_a_token_that_is_not_finite_spoils_no_other_token as test_trellis_not_finite,
)
from tests.kernels.test_trellis_cpu import test_experts as test_trellis_experts  # noqa: F401
from tests.kernels.test_trellis_cpu import test_linear as test_trellis_linear  # noqa: F401
from tests.rounding.test_trellis import random_packed as random_trellis

FOLDER = Path(os.environ[run.BUILD])
MODELS = {  # of QEMU: the instruction sets that the library finds there, best first
    "cortex-a72": ("portable",),
    "neoverse-n1": ("neon_dotprod", "portable"),
    "max": ("neon_i8mm", "neon_dotprod", "portable"),
}
native_library = cpu._library


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, EmulatedLibrary]]:
    with emulated_library(FOLDER, run.emulator(request.param)) as library:
        yield request.param, library


@pytest.fixture
def isa(model: tuple[str, EmulatedLibrary]) -> str:
    """The best instruction set of a CPU, in use. All tests with it run on emulated kernels."""
    name = MODELS[model[0]][0]
    cpu.use(name)
    return name


def test_the_best_instruction_set_of_the_cpu_is_found(model: tuple[str, EmulatedLibrary]) -> None:
    assert cpu.instruction_sets() == MODELS[model[0]]


@pytest.mark.parametrize("name", MODELS)
def test_random_calls(name: str) -> None:
    """fuzz_cpu.cpp, without sanitizers."""
    command = *run.emulator(name), str(FOLDER / "fuzz_cpu"), "60"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("60 rounds") == len(MODELS[name])


# Viterbi's algorithm


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("spread", [0.0, 130.0, 400.0, 1e9])
def test_the_search_finds_the_paths_of_the_oracle(isa: str, bits: int, spread: float) -> None:
    """Targets as usual, with equal costs, with costs that saturate; -2^15 as a distance."""
    generator = torch.Generator().manual_seed(bits)
    target = torch.randn(8, 192, generator=generator) * spread
    target[:, 64:96] *= 0.1
    target[0, :4] = torch.tensor([1e9, -1e9, 0.5 / viterbi.UNITS[bits], -300.0])
    assert torch.equal(viterbi.search(target, bits), viterbi.search_plainly(target, bits))


# The same bits as on x86


def on_x86(isa: str, compute: Callable[[], Tensor]) -> Tensor:
    """A result of this machine's library: of portable code for "portable", else of vectors with
    fused multiply-add, which NEON has as well."""
    emulated = cpu._library
    try:
        cpu._library = native_library
        cpu.use("portable" if isa == "portable" else cpu.instruction_sets()[0])
        return compute()
    finally:
        cpu.use(cpu.instruction_sets()[0])
        cpu._library = emulated


@pytest.fixture
def x86(isa: str) -> Callable[[Callable[[], Tensor]], Tensor]:
    if native_library().moepress_instruction_sets() == b"portable" and isa != "portable":
        pytest.skip("this CPU has no AVX2")
    return lambda compute: on_x86(isa, compute)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_scalar_products(
    x86: Callable[[Callable[[], Tensor]], Tensor], codec: Codec, activation_bits: int
) -> None:
    for tokens in (1, 2, 7):
        cols = 3 * codec.group_size
        packed = random_packed(37, cols, codec)
        x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
        args = x, packed, None, 37, codec, activation_bits
        assert torch.equal(cpu.linear(*args), x86(lambda args=args: cpu.linear(*args)))


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_trellis_products(
    x86: Callable[[Callable[[], Tensor]], Tensor], bits: int, group: int, activation_bits: int
) -> None:
    codec = Codec(bits, group, "trellis")
    for tokens in (1, 2, 7):
        packed = random_trellis(130, 3 * group, codec)
        x = torch.randn(tokens, 3 * group, generator=torch.Generator().manual_seed(tokens))
        args = x, packed, None, 130, codec, activation_bits
        assert torch.equal(cpu.linear(*args), x86(lambda args=args: cpu.linear(*args)))


@pytest.mark.parametrize("activation", sorted(set(cpu.ACTIVATIONS) - {"gelu"}))
def test_experts_of_both_codecs(
    x86: Callable[[Callable[[], Tensor]], Tensor], activation: str
) -> None:
    """gelu calls the C library, whose erff is another on each architecture."""
    for call in (
        make_case(tokens=9, activation=activation).call(8),
        experts_call(9, 96, 64, 32, activation, 8),
    ):
        assert torch.equal(cpu.experts(call), x86(lambda call=call: cpu.experts(call)))
