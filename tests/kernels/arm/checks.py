"""The C++ kernels of 64-bit ARM under emulation, against the oracles of test_cpu.py and others.

run.py runs this file: it needs a library that is compiled there. Most checks are the tests of the
kernels of this machine, with the fixture `isa` of this file: `moepress.kernels.cpu` then calls the
emulated library.
"""

from __future__ import annotations

import inspect
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moepress.format.codec import TRELLIS_BITS, Codec
from moepress.kernels import cpu
from moepress.kernels.cpu import interface
from moepress.rounding.methods import viterbi
from tests.kernels import (
    test_attention_cpu,
    test_cpu,
    test_gate_cpu,
    test_route_cpu,
    test_small_cpu,
    test_trellis_cpu,
)
from tests.kernels.arm import run
from tests.kernels.arm.emulated import EmulatedLibrary, emulated_library
from tests.kernels.gates import GATES, gated_call
from tests.kernels.test_kernels import CODECS, make_case, random_packed
from tests.rounding import test_trellis

FOLDER = Path(os.environ[run.BUILD])
MODELS = {  # of QEMU: the instruction sets that the library finds there, best first
    "cortex-a72": ("portable",),
    "neoverse-n1": ("neon_dotprod", "portable"),
    "max": ("neon_i8mm", "neon_dotprod", "portable"),
}
native_library = interface.library
OF_THIS_PROCESS = {  # tests of its threads, of torch's ops, and of more than is soon emulated
    "test_a_forked_process_has_a_pool_of_its_own",
    "test_as_torch_ops",
    "test_more_tokens_than_are_taken_at_a_time",
    "test_several_python_threads_at_once",
    "test_the_number_of_threads_changes_nothing",
}


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


# Against the oracles


def kernel_tests(module: ModuleType) -> dict[str, Callable[..., None]]:
    """The tests of a module with a fixture `isa`, by a name that tells the module too."""
    module_name = module.__name__.rpartition(".")[2]
    return {
        f"{module_name}_{name.removeprefix('test_')}": test
        for name, test in vars(module).items()
        if name.startswith("test_")
        and name not in OF_THIS_PROCESS
        and "isa" in inspect.signature(test).parameters
    }


for module in (
    test_cpu,
    test_trellis_cpu,
    test_gate_cpu,
    test_small_cpu,
    test_route_cpu,
    test_attention_cpu,
):
    globals().update(kernel_tests(module))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("spread", [0.0, 130.0, 400.0, 1e9])
def test_the_search_finds_the_paths_of_the_oracle(isa: str, bits: float, spread: float) -> None:
    """Targets as usual, with equal costs, with costs that saturate; -2^15 as a distance."""
    generator = torch.Generator().manual_seed(int(10 * bits))
    target = torch.randn(8, 192, generator=generator) * spread
    target[:, 64:96] *= 0.1
    target[0, :4] = torch.tensor([1e9, -1e9, 0.5 / viterbi.UNITS[bits], -300.0])
    assert torch.equal(viterbi.search(target, bits), viterbi.search_plainly(target, bits))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_trellis_columns(isa: str, bits: float) -> None:
    test_trellis.test_rounding_in_place(bits, 192)
    test_trellis.test_values_of_branches(bits, (192, 72))


# The same bits as on x86


def on_x86(isa: str, compute: Callable[[], Tensor]) -> Tensor:
    """A result of this machine's library: of portable code for "portable", else of vectors with
    fused multiply-add and products of bytes, which NEON has as well."""
    emulated = interface.library
    try:
        interface.library = native_library
        cpu.use("portable" if isa == "portable" else cpu.instruction_sets()[0])
        return compute()
    finally:
        cpu.use(cpu.instruction_sets()[0])
        interface.library = emulated


Same = Callable[[Callable[[], Tensor]], bool]


@pytest.fixture
def same(isa: str) -> Same:
    """Whether a result is the same on this machine, bit by bit."""
    best = native_library().moepress_instruction_sets().decode().split()[0]
    if isa != "portable" and best in test_trellis_cpu.SUMS_WORDS:
        pytest.skip("this CPU has no products of bytes")
    return lambda compute: torch.equal(compute(), on_x86(isa, compute))


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_scalar_products(same: Same, codec: Codec, activation_bits: int) -> None:
    packed = random_packed(37, 3 * codec.group_size, codec)
    x = torch.randn(7, 3 * codec.group_size, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 2, 7):
        args = x[:tokens], packed, None, 37, codec, activation_bits
        assert same(lambda args=args: cpu.linear(*args))


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_trellis_products(same: Same, bits: float, group: int, activation_bits: int) -> None:
    codec = Codec(bits, group, "trellis")
    packed = test_trellis.random_packed(130, 3 * group, codec)
    x = torch.randn(21, 3 * group, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 2, 7, 21):
        args = x[:tokens], packed, None, 130, codec, activation_bits
        assert same(lambda args=args: cpu.linear(*args))


@pytest.mark.parametrize("activation", sorted(set(cpu.ACTIVATIONS) - {"gelu"}))
def test_experts_of_both_codecs(same: Same, activation: str) -> None:
    """gelu calls the C library, whose erff is another on each architecture."""
    for call in (
        make_case(tokens=9, activation=activation).call(8),
        test_trellis_cpu.experts_call(9, 96, 64, 32, activation, 8),
    ):
        assert same(lambda call=call: cpu.experts(call))


@pytest.mark.parametrize("family", ["int", "trellis"])
def test_gates_and_biases(same: Same, family: str) -> None:
    for gate in GATES.values():
        call = gated_call(gate, family, biases=(True, True))
        assert gate.activation == "gelu" or same(lambda call=call: cpu.experts(call))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "chosen"])
def test_routers(same: Same, score: str) -> None:
    """sqrtsoftplus calls the C library, as does what is tried with far logits."""
    for dtype in test_route_cpu.FLOATS:
        for i in range(3):
            assert same(lambda i=i, dtype=dtype: test_route_cpu.large_call(score, dtype, 3)[i])


def test_dropped_choices(same: Same) -> None:
    index = torch.randint(9, (50, 4), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(50, 4, generator=torch.Generator().manual_seed(1))
    args = index, weights, torch.tensor([0.0, 0.3, 0.5, 0.9]), True, torch.arange(50) % 3 == 0, 9
    for i in range(3):
        assert same(lambda i=i: cpu.drop(*args)[i])
