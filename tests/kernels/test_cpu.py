"""C++ kernels on each instruction set of this machine, against an oracle of their arithmetic."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import GRID_BITS, Codec
from moepress.kernels import backends, cpu, reference
from moepress.kernels.cpu import interface
from moepress.kernels.reference import ACTIVATIONS, dequantize, round_activations
from tests.kernels.test_kernels import (
    CODECS,
    Case,
    make_case,
    op_arguments,
    op_calls,
    random_packed,
    within_twice_plain,
)

SOURCES = Path(__file__).parents[2] / "src/moepress/kernels/cpu"
MISSING = cpu.missing()


def test_the_library_exists_where_a_compiler_does() -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    assert MISSING is None
    assert cpu.instruction_sets()[-1] == "portable"
    assert kernels.status()[0].backend == "cpu"


# The arithmetic


@pytest.mark.parametrize("bits", [8, 16])
def test_rounded_activations_are_the_formula(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 128) * torch.tensor([1e-20, 1.0, 1e20])[:, None]
    x[0, :64] = 0
    got = torch.unflatten(round_activations(x, 64, bits), 1, (2, 64))
    groups = torch.unflatten(x, 1, (2, 64))
    largest = groups.abs().amax(-1, keepdim=True)
    step = largest / {8: 127, 16: 128 * 127}[bits]
    assert got[0, 0].eq(0).all()
    assert ((got - groups).abs() <= step * 0.5001).all()
    codes = (got / step)[1:]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=0.01)
    # Over a whole group, 8 bits are coarser than bfloat16 and 16 bits finer.
    of_bfloat16 = (groups.bfloat16().float() - groups)[1:].norm()
    assert ((got - groups)[1:].norm() < of_bfloat16) == (bits == 16)
    bad = round_activations(torch.tensor([[1.0] * 31 + [torch.inf], [torch.nan] * 32]), 32, bits)
    assert bad.isnan().all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_linear(isa: str, codec: Codec, bits: int) -> None:
    """All panel widths, a last block that is not full, a single group."""
    torch.manual_seed(1)
    for tokens, rows, groups in ((1, 1, 1), (2, 37, 3), (3, 16, 2), (5, 33, 1), (37, 50, 2)):
        cols = groups * codec.group_size
        packed, x = random_packed(rows, cols, codec), torch.randn(tokens, cols)
        bias = torch.randn(rows)
        args = packed, bias, rows, codec, bits
        exact = reference.linear(x.double(), packed, bias.double(), rows, codec, bits, rounded=True)
        within_twice_plain(cpu.linear(x, *args), reference.linear(x, *args, rounded=True), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_half_precision(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    codec, rows, cols = Codec(3, 32), 37, 128
    packed, x = random_packed(rows, cols, codec), torch.randn(2, 5, cols).to(dtype)
    bias = torch.randn(rows).to(dtype)
    weight = dequantize(packed, rows, cols, codec)
    rounded = round_activations(x.double(), 32, 16)
    y = cpu.linear(x, packed, bias, rows, codec, 16)
    plain = F.linear(rounded.to(dtype), weight.to(dtype), bias)
    within_twice_plain(y, plain, rounded @ weight.double().T + bias.double())


def test_float64_is_left_to_the_reference(isa: str) -> None:
    codec = Codec(2, 32)
    packed, x = random_packed(8, 64, codec), torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(
        cpu.linear(x, packed, None, 8, codec, 8), reference.linear(x, packed, None, 8, codec)
    )


def oracle(case: Case, bits: int, dtype: torch.dtype) -> Tensor:
    call = dataclasses.replace(case.call(bits), hidden=case.hidden.to(dtype))
    return reference.experts(call, rounded=True)


def check(case: Case, bits: int) -> None:
    y = cpu.experts(case.call(bits))
    plain, exact = (oracle(case, bits, d) for d in (torch.float32, torch.float64))
    if bits == 8:
        # An activation halfway between two codes may be rounded to either, here and in PyTorch.
        # One such activation outweighs all rounding of floats. At 16 bits it weighs 128 times less.
        assert (y - exact).norm() <= 2 * (plain - exact).norm() + 2e-3 * exact.norm()
    else:
        slack = 2e-5 * exact.norm()
        assert (y - exact).norm() <= 2 * (plain - exact).norm() + slack


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens, k", [(1, 2), (7, 2), (40, 1), (3, 4), (0, 2), (150, 4)])
def test_experts(isa: str, tokens: int, k: int, bits: int) -> None:
    check(make_case(tokens=tokens, k=k), bits)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(isa: str, activation: str) -> None:
    for size in (0.05, 1, 30):  # near zero, as usual, saturated
        case = make_case(activation=activation, tokens=9)
        check(dataclasses.replace(case, hidden=case.hidden * size), 16)


def test_activation_names_are_those_of_the_reference() -> None:
    assert set(cpu.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("sentinel", [5, -1, 1000, 2**62, -(2**63)])
def test_an_index_that_is_no_expert_contributes_nothing(isa: str, sentinel: int) -> None:
    case = make_case()
    case.index[0] = sentinel
    case.index[1, 0] = sentinel
    assert cpu.experts(case.call(8))[0].eq(0).all()
    check(case, 16)
    case.index[:] = sentinel
    assert cpu.experts(case.call(8)).eq(0).all()
    one = dataclasses.replace(
        case, hidden=case.hidden[:1], index=case.index[:1], weights=case.weights[:1]
    )
    assert cpu.experts(one.call(8)).eq(0).all()


def test_an_expert_chosen_twice_counts_twice(isa: str) -> None:
    case = make_case()
    case.index[:, 1] = case.index[:, 0]
    check(case, 16)


def test_one_token_that_chooses_some_experts_more_often_than_others(isa: str) -> None:
    case = make_case(tokens=1)
    check(
        dataclasses.replace(
            case, index=torch.tensor([[0, 3, 3, 3, 3, 3]]), weights=torch.rand(1, 6)
        ),
        16,
    )


# What users may rely on


@pytest.mark.parametrize("bits", [8, 16])
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(isa: str, bits: int) -> None:
    case = make_case(tokens=40)
    whole = cpu.experts(case.call(bits))
    for t in (0, 7, 39):
        at = slice(t, t + 1)
        alone = dataclasses.replace(
            case, hidden=case.hidden[at], index=case.index[at], weights=case.weights[at]
        )
        assert torch.equal(cpu.experts(alone.call(bits))[0], whole[t])
    codec, x = Codec(3, 64), case.hidden
    packed = random_packed(37, 64, codec)
    y = cpu.linear(x, packed, None, 37, codec, bits)
    assert torch.equal(cpu.linear(x[3:4], packed, None, 37, codec, bits)[0], y[3])


@pytest.mark.parametrize("tokens", [4097, 9000])
def test_more_tokens_than_are_taken_at_a_time(isa: str, tokens: int) -> None:
    case = make_case(tokens=tokens)
    packed, codec, x = random_packed(37, 64, Codec(3, 64)), Codec(3, 64), case.hidden.bfloat16()
    whole = (
        cpu.experts(case.call(8)),
        cpu.linear(x, packed, None, 37, codec, 8),
        cpu.experts(dataclasses.replace(case.call(8), hidden=x)),
    )
    for at in (slice(0, 9), slice(tokens // 2 - 5, tokens // 2 + 5), slice(tokens - 9, tokens)):
        some = dataclasses.replace(
            case, hidden=case.hidden[at], index=case.index[at], weights=case.weights[at]
        )
        assert torch.equal(cpu.experts(some.call(8)), whole[0][at])
        half = dataclasses.replace(some.call(8), hidden=x[at])
        assert torch.equal(cpu.experts(half), whole[2][at])
        assert torch.equal(cpu.linear(x[at], packed, None, 37, codec, 8), whole[1][at])


@pytest.mark.parametrize("team", ["openmp", "pool"])
def test_the_number_of_threads_changes_nothing(isa: str, team: str) -> None:
    library, before = interface.library(), torch.get_num_threads()
    library.moepress_lend_team(interface.openmp_team() if team == "openmp" else None)
    case = make_case(tokens=40)
    results = []
    try:
        for threads in (1, 2, 5, 3):
            torch.set_num_threads(threads)
            results.append(cpu.experts(case.call(8)))
    finally:
        torch.set_num_threads(before)
        library.moepress_lend_team(interface.openmp_team())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_forked_process_has_a_pool_of_its_own(isa: str) -> None:
    """The child asks for more threads than the parent had started and gets the same result."""
    code = """
import os, torch
from moepress.kernels import cpu
from moepress.kernels.cpu import interface
from tests.kernels.test_kernels import make_case

case = make_case(tokens=40)
interface.library().moepress_lend_team(None)
torch.set_num_threads(2)
y = cpu.experts(case.call(8))
child = os.fork()
torch.set_num_threads(5)
same = torch.equal(cpu.experts(case.call(8)), y)
if not child:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)


def test_several_python_threads_at_once(isa: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(tokens=40)
    expected = cpu.experts(case.call(8))
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: cpu.experts(case.call(8)), range(40)):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_no_other_token(isa: str, bad: float) -> None:
    case = make_case(tokens=20)
    clean = cpu.experts(case.call(8))
    case.hidden[3, 5] = bad
    y = cpu.experts(case.call(8))
    assert y[3].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(y[others], clean[others])


def test_views_and_bytes_at_odd_addresses(isa: str) -> None:
    codec, rows = Codec(3, 32), 21
    packed = random_packed(rows, 64, codec)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]
    x = torch.randn(64, 5).T
    expected = cpu.linear(x.contiguous(), packed, None, rows, codec, 8)
    assert torch.equal(cpu.linear(x, moved, None, rows, codec, 8), expected)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_embedding_equals_the_reference_bit_by_bit(isa: str, codec: Codec) -> None:
    rows, cols = 53, 2 * codec.group_size
    packed = random_packed(rows, cols, codec)
    for ids in (torch.tensor([[3, 52, 3], [0, 17, 16]]), torch.tensor(5), torch.empty(0).long()):
        for dtype in (torch.float32, torch.bfloat16):
            args = ids, packed, rows, cols, codec, dtype
            assert torch.equal(cpu.embedding(*args), reference.embedding(*args))
    for wrong in (-1, rows, 2**62):
        with pytest.raises(InputError, match="tokenizer"):
            cpu.embedding(torch.tensor([0, wrong]), packed, rows, cols, codec, torch.float32)


@pytest.mark.parametrize("call", range(4))
def test_as_torch_ops(isa: str, call: int) -> None:
    op, args = op_calls()[call]
    torch.library.opcheck(op.op, args)
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), op(*args))
    torch._dynamo.reset()


# Bad input


@given(
    entry=st.tuples(
        st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-300, 40000)),
        st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from(GRID_BITS)),
    ),
    which=st.sampled_from(("gate_up", "down")),
    expert=st.integers(0, 4),
    cut=st.integers(0, 2000),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.skipif(MISSING is not None, reason=f"the library {MISSING}")
def test_damaged_tables_are_refused_or_lead_to_bytes_inside(
    entry: tuple[int, int], which: str, expert: int, cut: int
) -> None:
    call = make_case().call()
    packed, table = getattr(call, which), getattr(call, f"{which}_table").clone()
    table[expert] = torch.tensor(entry)
    damaged = {which: packed[: len(packed) - cut], f"{which}_table": table}
    try:
        y = cpu.experts(dataclasses.replace(call, **damaged))
    except InputError:
        return
    assert y.shape == (7, 64)


def test_refusals_say_what_is_wrong(isa: str) -> None:
    call = make_case().call()
    with pytest.raises(InputError, match=r"'swoosh' is not supported.*silu"):
        cpu.experts(dataclasses.replace(call, activation="swoosh"))
    four_bits = dataclasses.replace(call, activation_bits=4)
    with pytest.raises(InputError, match="activation bits are 8 or 16"):
        cpu.experts(four_bits)
    with pytest.raises(InputError, match=r"activation_bits is 4. Expected one of \[8, 16\]"):
        kernels.experts(*op_arguments(four_bits))
    with pytest.raises(InputError, match="gate_up_table has 5 experts, down_table 4"):
        cpu.experts(dataclasses.replace(call, down_table=call.down_table[:4]))
    with pytest.raises(InputError, match="outside its packed bytes"):
        cpu.linear(torch.randn(1, 64), torch.zeros(63, dtype=torch.uint8), None, 1, Codec(2, 32), 8)
    with pytest.raises(InputError, match=r"'vliw' is not here.*portable"):
        cpu.use("vliw")


def test_without_the_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    interface.library.cache_clear()
    backends._choose.cache_clear()
    try:
        for _ in range(2):
            kernels.linear(torch.randn(1, 64), random_packed(8, 64, Codec(2, 32)), None, 8, 2, 32)
        (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "runs reference, not cpu" in record.getMessage()
        assert "Install one (g++ or clang)" in record.getMessage()
        (tmp_path / "libmoepress_cpu.so").write_bytes(b"no library")
        assert "cannot be loaded" in (cpu.missing() or "")
    finally:
        monkeypatch.undo()
        interface.library.cache_clear()
        backends._choose.cache_clear()
    assert cpu.missing() == MISSING


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler")
@pytest.mark.parametrize(
    "source",
    [
        "",
        'extern "C" int moepress_interface() { return 1; }',
        f'extern "C" int moepress_interface() {{ return {interface.INTERFACE}; }}',  # and no more
    ],
)
def test_a_library_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    library = tmp_path / "libmoepress_cpu.so"
    command = "c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)
    subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    interface.library.cache_clear()
    try:
        assert cpu.missing() == f"{library.name} is of another version. Install moepress again"
    finally:
        monkeypatch.undo()
        interface.library.cache_clear()
    assert cpu.missing() == MISSING


@pytest.mark.skipif(MISSING is not None, reason="needs the library")
def test_bfloat16_is_converted_as_torch_does() -> None:
    """The library takes bfloat16 and rounds its floats to it: results are the same bits."""
    torch.manual_seed(0)
    codec = Codec(4, 32)
    packed, bias = random_packed(1500, 64, codec), torch.randn(1500)
    bias[:5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -1e-40])
    for tokens in (1, 3, 60):  # 60: more numbers than a thread converts at a time
        x = torch.randn(tokens, 64).bfloat16()
        y = cpu.linear(x, packed, bias, 1500, codec, 8)
        wide = cpu.linear(x.float(), packed, bias, 1500, codec, 8).bfloat16()
        assert y[:, 2].isnan().all()
        assert torch.equal(y.nan_to_num(7.0), wide.nan_to_num(7.0))
    call = make_case().call()
    half = dataclasses.replace(call, hidden=call.hidden.bfloat16())
    wide = cpu.experts(dataclasses.replace(half, hidden=half.hidden.float()))
    assert torch.equal(cpu.experts(half), wide.bfloat16())


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler")
def test_every_header_compiles_on_its_own(tmp_path: Path) -> None:
    """The target `headers` of CMakeLists.txt: a header includes everything that it uses."""
    for command in (("-GNinja", "-S", str(SOURCES)), ("--build", ".", "--target", "headers")):
        done = subprocess.run(("cmake", *command), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler")
def test_no_byte_outside_is_touched(tmp_path: Path) -> None:
    """Run tests/kernels/fuzz_cpu.cpp with the address and undefined behaviour sanitizers."""
    options = ["-DMOEPRESS_SANITIZE=ON", f"-DMOEPRESS_FUZZ={Path(__file__).parent}/fuzz_cpu.cpp"]
    run = lambda *command: subprocess.run(  # noqa: E731
        command, capture_output=True, text=True, timeout=600
    )
    made = run("cmake", "-GNinja", "-S", str(SOURCES), "-B", str(tmp_path), *options)
    assert made.returncode == 0, made.stderr
    made = run("cmake", "--build", str(tmp_path), "-j", "2")
    assert made.returncode == 0, made.stdout + made.stderr
    done = run(str(tmp_path / "fuzz_cpu"), "400")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "400 rounds" in done.stdout
