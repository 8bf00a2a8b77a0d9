"""The trellis codec: bytes against docs/format.md, paths against enumeration, whole folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress import kernels
from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.compress import compress
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError, NumericalError
from moepress.format.checkpoint import load_json
from moepress.format.codec import (
    HALF_WIDTHS,
    TRELLIS_BITS,
    Codec,
    PackedSpec,
    width_number,
    width_of,
)
from moepress.format.quantization import packed_specs
from moepress.kernels import cpu, reference, scalar, trellis
from moepress.original.experts import ExpertWeights, Routed, RoutedExpert
from moepress.original.source import Source
from moepress.recipe import Recipe
from moepress.rounding import fit, sweep
from moepress.rounding.expert import round_experts
from moepress.rounding.factor import block_feedback
from moepress.rounding.hessian import Hessian
from moepress.rounding.inputs import Inputs
from moepress.rounding.methods import Unrounded, quantize_matrix, viterbi
from moepress.rounding.methods import trellis as trellis_rounding
from moepress.rounding.methods.trellis import path_values, quantize_together
from moepress.rounding.options import Rounding
from tests.conftest import small_recipe
from tests.rounding.alone import quantize_trellis
from tests.rounding.test_methods import BFLOAT16_UNIT, UNIT, dense_hessian

# Mean squared error on Gaussian weights of variance 1 (docs/log.md#trellis-values).
DISTORTION = {1: 0.275, 1.5: 0.1427, 2: 0.0725, 2.5: 0.0387, 3: 0.0191, 3.5: 0.0100, 4: 0.0050}


def codec_of(bits: float, group: int = 32) -> Codec:
    return Codec(bits, group, "trellis")


def random_branches(rows: int, cols: int, bits: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(2 * seed))
    padded = rows + -rows % 64
    low, high = trellis.branch_bits(bits)  # of columns 0, 1, 4, 5 of a tile, and of the others
    branches = torch.randint(2**high, (padded, cols), generator=generator, dtype=torch.uint8)
    branches.view(padded, -1, 2, 2)[:, :, 0] %= 2**low
    return branches, (0.001 + 0.001 * torch.rand(rows, generator=generator)).bfloat16()


def random_packed(rows: int, cols: int, codec: Codec, seed: int = 0) -> Tensor:
    return trellis.pack(*random_branches(rows, cols, codec.bits, seed), codec)


def oracle_weights(packed: Tensor, rows: int, cols: int, bits: float) -> np.ndarray:
    """docs/format.md, 'Where to find w'[n, k]', one weight and one bit at a time."""
    data = bytes(packed.tolist())
    slabs = -(-rows // 64)
    slab_bytes = round(8 * cols * bits)

    def bit(slab: int, tile: int, lane: int, parity: int, place: int) -> int:
        at = slab * slab_bytes + lane * 4 + parity * 2
        if bits in HALF_WIDTHS:
            at += tile // 2 * round(128 * bits)
            word, from_high = 0, 8 * (tile % 2) + place
            if place >= 8:
                word = 1 + tile % 2 * int(bits) + (place - 8) // 16
                from_high = (place - 8) % 16
        else:
            at += tile * 64 * int(bits)
            word, from_high = place // 16, place % 16
        number = int.from_bytes(data[at + 64 * word : at + 64 * word + 2], "little")
        return number >> (15 - from_high) & 1

    w = np.empty((rows, cols), np.float32)
    for n in range(rows):
        at = slabs * slab_bytes + 2 * n
        raw = int.from_bytes(data[at : at + 2], "little") << 16
        scale = np.array([raw], np.uint32).view(np.float32)[0]
        slab, lane = n // 64, n % 16
        for k in range(cols):
            tile, parity = k // 8, k % 2
            step = 4 * (n % 64 // 16) + k % 8 // 2
            last = int(bits * (step + 1)) - 1
            state = 0
            for age in range(12):
                s, place = slab, last - age
                if place < 0:
                    s, place = (slab - 1) % slabs, place + round(16 * bits)
                state |= bit(s, tile, lane, parity, place) << age
            width = {1.5: (1, 2), 2.5: (3, 3), 3.5: (4, 4)}.get(bits, (bits, bits))[step % 2]
            product = state * {1: 47255, 2: 54641, 3: 44529, 4: 15601}[width]
            octets = [product >> 8 * i & 255 for i in range(2 if width < 3 else 4)]
            w[n, k] = scale * np.float32(sum(octets) - {1: 255, 2: 255, 3: 386, 4: 379}[width])
    return w


# Bytes


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("rows, cols", [(1, 32), (64, 32), (70, 64)])
def test_weights_are_those_of_the_format(
    bits: float, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = codec_of(bits)
    packed = random_packed(rows, cols, codec)
    assert packed.shape == (codec.nbytes(rows, cols),)
    monkeypatch.setattr(trellis, "STRIP_WEIGHTS", 64 * cols)  # a strip is a slab
    found = torch.cat([part for _, part in trellis.strips(packed, rows, cols, codec)])
    assert torch.equal(found, torch.from_numpy(oracle_weights(packed, rows, cols, bits)))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("rows", [1, 64, 100])
def test_unpack_gives_back_what_was_packed(bits: float, rows: int) -> None:
    parts = random_branches(rows, 96, bits, seed=rows)
    back = trellis.unpack(trellis.pack(*parts, codec_of(bits)), rows, 96, codec_of(bits))
    assert all(torch.equal(there, here) for there, here in zip(parts, back, strict=True))


@pytest.mark.skipif(cpu.missing() is not None, reason="needs the library")
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("rows, cols", [(64, 32), (192, 96)])
def test_compiled_packing_gives_the_same_bytes(bits: float, rows: int, cols: int) -> None:
    branches, _ = random_branches(rows, cols, bits)
    expected = trellis.pack_codes(branches, bits)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.trellis_pack(branches, bits), expected)
    finally:
        torch.set_num_threads(before)
    of_columns = branches.T.contiguous().T  # strides of a transposed matrix
    assert torch.equal(cpu.trellis_pack(of_columns, bits), expected)


@pytest.mark.skipif(cpu.missing() is not None, reason="needs the library")
def test_codes_are_on_the_cpu_whatever_device_is_the_default() -> None:
    branches, _ = random_branches(64, 32, 2)
    columns = torch.randn(8, 64)
    found = []
    for default in ("meta", "cpu"):
        trellis.signs.cache_clear()
        with torch.device(default):
            found.append(
                (
                    cpu.trellis_values(branches, 2),
                    cpu.trellis_pack(branches, 2),
                    cpu.trellis_search(columns, 2),
                    trellis.rotate(columns),
                    trellis.code_values(2),
                )
            )
    assert all(map(torch.equal, *found))


def test_bytes_that_do_not_fit_are_refused() -> None:
    branches, scales = random_branches(64, 32, 2)
    with pytest.raises(InputError, match="got 3"):
        trellis.pack(branches | 3, scales, codec_of(1))
    with pytest.raises(InputError, match=r"branches 0 to 3, got 7"):  # 8 exist in the next columns
        trellis.pack(branches | 7, scales, codec_of(2.5))
    with pytest.raises(InputError, match=r"\[64, K\] uint8"):
        trellis.pack(branches[:32], scales, codec_of(2))
    with pytest.raises(InputError, match=r"\[N\] bfloat16"):
        trellis.pack(branches, scales.float(), codec_of(2))
    with pytest.raises(InputError, match="is \\[640\\] uint8"):
        trellis.unpack(torch.zeros(3, dtype=torch.uint8), 64, 32, codec_of(2))
    with pytest.raises(InputError, match="8-bit codes do not exist in family 'trellis'"):
        codec_of(8)
    with pytest.raises(InputError, match="No codec family 'lattice'"):
        Codec(2, 32, "lattice")


def test_the_scalar_packer_refuses_trellis_codes() -> None:
    branches, scales = random_branches(64, 32, 2)
    with pytest.raises(InputError, match="is no scalar code"):
        scalar.pack(branches, scales[:, None], None, codec_of(2))
    with pytest.raises(InputError, match="is no scalar code"):
        scalar.unpack(random_packed(64, 32, codec_of(2)), 64, 32, codec_of(2))


def test_the_spec_names_its_family_only_if_it_is_not_int() -> None:
    for family in ("int", "trellis"):
        spec = PackedSpec((1, 2), 64, family)
        assert PackedSpec.from_json(spec.to_json()) == spec
        assert ("family" in spec.to_json()) == (family == "trellis")


def test_the_spec_of_half_widths_has_commas() -> None:
    spec = PackedSpec((1.5, 0, 2.0, 4), 64, "trellis")
    assert spec.to_json()["bits"] == "1.5,0,2,4"
    assert PackedSpec.from_json(spec.to_json()) == spec
    assert spec.table(64, 64)[:3] == [(0, 15), (896, 0), (896, 2)]
    assert PackedSpec((2.0,), 64, "trellis").to_json()["bits"] == "2"
    fields: dict[str, str | int] = {"bits": "2.5", "group_size": 32, "family": "trellis"}
    assert PackedSpec.from_json(fields).bits == (2.5,)
    with pytest.raises(InputError, match=r"1\.5-bit codes do not exist in family 'int'"):
        PackedSpec((1.5,), 64)


def test_numbers_of_widths() -> None:
    assert [width_number(bits) for bits in (0, *TRELLIS_BITS, 8)] == [0, 1, 15, 2, 25, 3, 35, 4, 8]
    assert all(width_of(width_number(bits)) == bits for bits in (0, *TRELLIS_BITS, 8))
    assert isinstance(Codec(2.0, 32, "trellis").bits, int)


# Rotation


@pytest.mark.parametrize(
    "cols, run", [(64, 64), (96, 32), (11 * 32, 32), (5 * 128, 128), (3 * 512, 256)]
)
def test_rotation_is_signs_and_sylvesters_matrix(cols: int, run: int) -> None:
    assert trellis.run_length(cols) == run
    q = np.kron(np.eye(cols // run), sylvester(run)) / np.sqrt(run) * trellis.signs(cols).numpy()
    x = torch.randn(5, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trellis.rotate(x), x @ torch.from_numpy(q.T))
    torch.testing.assert_close(trellis.rotate_back(trellis.rotate(x)), x)


def test_about_half_of_the_signs_are_negative() -> None:
    signs = trellis.signs(256)
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(signs.sum()) < 2 * 16  # two standard deviations of a fair coin
    assert torch.equal(signs[:128], trellis.signs(128))
    assert torch.equal(signs.repeat(16), trellis.signs(4096))  # every run alike


# Paths


@pytest.mark.parametrize("bits, steps", [(1, 12), (1.5, 8), (2.5, 5), (3, 4)])
def test_a_path_is_the_best_of_all(bits: float, steps: int) -> None:
    """All continuations of one state, 2**12 of them, enumerated."""
    start, widths = 1234, [trellis.branch_bits(bits)[t % 2] for t in range(steps)]
    generator = torch.Generator().manual_seed(int(10 * bits))
    target = (torch.randn(1, steps, generator=generator) * 8000).round().int()
    values = trellis.values_in_turn(bits) * viterbi.UNITS[bits]
    costs = torch.full((1, 4096), viterbi.LARGEST, dtype=torch.int32)
    costs[0, start] = 0
    branches, states = viterbi._best_path(target, costs, values, bits)
    least = None
    for path in itertools.product(*(range(2**width) for width in widths)):
        state, cost = start, 0
        for t, (branch, x) in enumerate(zip(path, target[0].tolist(), strict=True)):
            state = (state << widths[t] | branch) % 4096
            d = max(-32768, min(32767, x - int(values[t % 2, state])))
            cost = min(cost + (d * d + 2**14 >> 15), viterbi.LARGEST)
        if least is None or cost < least[0]:
            least = cost, [path]
        elif cost == least[0]:
            least[1].append(path)
    assert least is not None and tuple(branches[0].tolist()) in least[1]
    state = start
    for width, branch in zip(widths, branches[0].tolist(), strict=True):
        state = (state << width | branch) % 4096
    assert int(states[0, -1]) == state


@pytest.mark.parametrize("instruction_set", () if cpu.missing() else cpu.instruction_sets())
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_c_finds_the_path_of_the_oracle(
    bits: float, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(int(10 * bits))
    cpu.use(instruction_set)
    try:
        for rows in (64, 192):
            target = torch.randn(8, rows, generator=generator) * 130
            target[0, :3] = torch.tensor([1e9, -1e9, 0.5 / viterbi.UNITS[bits]])
            assert torch.equal(viterbi.search(target, bits), viterbi.search_plainly(target, bits))
    finally:
        cpu.use(cpu.instruction_sets()[0])


@pytest.mark.parametrize(("bits", "rows"), [(1, 64), (1.5, 128), (2.5, 192), (4, 64 * 66)])
def test_rounding_in_place(bits: float, rows: int) -> None:
    """Eight of sixteen columns of two matrices. Paths of more than 64 slabs are found in runs."""
    generator = torch.Generator().manual_seed(int(10 * bits))
    target, feedback = (torch.randn(2, 16, rows, generator=generator) * s for s in (90, 20))
    left, errors = target.clone(), feedback.clone()
    branches = torch.full((2, 16, rows), 7, dtype=torch.uint8)
    widths = (bits, 5 - bits)
    viterbi.round_together(left, errors, branches, widths, 8)
    for number, width in enumerate(widths):
        assert left[number, :8].equal(target[number, :8])
        assert errors[number, :8].equal(feedback[number, :8])
        one = target[number, 8:].clone(), feedback[number, 8:].clone()
        found = torch.empty(8, rows, dtype=torch.uint8)
        viterbi.round_plainly(*one, found, width)
        assert branches[number, 8:].equal(found) and branches[number, :8].eq(7).all()
        assert left[number, 8:].equal(one[0]) and errors[number, 8:].equal(one[1])
        wanted = target[number, 8:] + feedback[number, 8:]
        assert found.equal(viterbi.search_plainly(wanted, width))
        assert one[0].equal(wanted - trellis.code_matrix(found.T.contiguous(), width).T)


@pytest.mark.parametrize("shape", [(64, 8), (192, 72), (640, 264)])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_values_of_branches(bits: float, shape: tuple[int, int]) -> None:
    branches, _ = random_branches(*shape, bits)
    assert path_values(branches, bits).equal(trellis.code_matrix(branches, bits))
    columns = branches.T.contiguous().T  # not contiguous
    assert path_values(columns, bits).equal(trellis.code_matrix(branches, bits))


@pytest.mark.parametrize("instruction_set", () if cpu.missing() else cpu.instruction_sets())
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 400.0, 1e9])
def test_equal_and_saturated_costs(bits: float, instruction_set: str, spread: float) -> None:
    """Targets with many equally good paths, and targets so far away that all costs saturate."""
    generator = torch.Generator().manual_seed(int(10 * bits))
    target = torch.randn(8, 128, generator=generator).round() * spread
    target[:, 64:96] *= 0.1  # costs become small again
    cpu.use(instruction_set)
    try:
        assert torch.equal(viterbi.search(target, bits), viterbi.search_plainly(target, bits))
    finally:
        cpu.use(cpu.instruction_sets()[0])


def test_long_paths_are_found_in_runs() -> None:
    if cpu.missing():
        pytest.skip(f"the library {cpu.missing()}")
    target = torch.randn(8, 64 * 66, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(viterbi.search(target, 4), viterbi.search_plainly(target, 4))


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_error_on_gaussian_weights_is_as_measured(bits: float) -> None:
    """Within 5 % of that of a million weights. The best scalar codes have 0.36, 0.118, 0.035."""
    if cpu.missing():
        pytest.skip(f"the library {cpu.missing()}")
    weight = torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))
    matrix = quantize_matrix("rtn", weight, codec_of(bits))
    error = (matrix.dequantize() - weight).square().mean() / weight.square().mean()
    assert error == pytest.approx(DISTORTION[bits], rel=0.05)


# Rounding


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    scale = torch.logspace(0, -2, features)
    return torch.randn(tokens, features, generator=generator) * scale @ mix


def squared_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((weight - rounded).double() @ x.double().T).square().sum())


def test_block_feedback_is_the_loss_by_blocks() -> None:
    """(E V)_B U_BB = (E U)_B for every error E and block B, so their squares add up to the loss.

    A float32 solution of V_JB R_BB = R_JB leaves at most 8 UNIT |V_JB| |R_BB| (test_methods.py).
    Three more roundings make U of R and D, here too.
    """
    hessian = Hessian(32, "cpu")
    hessian.add(correlated(200, 32))
    factor = hessian.factor(0.01)
    v, r = block_feedback(factor.feedback).double(), factor.feedback.double()
    u = r * factor.curvature.double().sqrt()
    error = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for b in range(0, 32, 8):
        block = slice(b, b + 8)
        mine = (error @ v)[:, block] @ u[block, block]
        bound = 11 * UNIT * (error.abs() @ v.abs())[:, block] @ u[block, block].abs()
        assert ((mine - (error @ u)[:, block]).abs() <= bound).all()
        assert torch.equal(v[b + 8 :, block], torch.zeros_like(v[b + 8 :, block]))
        # V_BB R_BB = R_BB up to the same, so V_BB = I up to that times the inverse of R_BB.
        inverse = torch.linalg.inv(r[block, block]).abs()
        bound = 8 * UNIT * v[block, block].abs() @ r[block, block].abs() @ inverse
        assert ((v[block, block] - torch.eye(8)).abs() <= bound).all()


@pytest.mark.skipif(cpu.missing() is not None, reason="needs the library")
@pytest.mark.parametrize("rows", [1, 513, 1030])  # a thread has 512 at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_sums_of_the_fit(
    rows: int, dtype: torch.dtype, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessian = Hessian(96, "cpu")
    hessian.add(correlated(200, 96))
    factor = hessian.factor(0.01)
    generator = torch.Generator().manual_seed(rows)
    weighted = list(factor.products(torch.randn(96, rows, generator=generator), dtype))
    residual = torch.randn(rows, 96, generator=generator).T  # not contiguous
    per_scale = torch.rand(rows, generator=generator) if scaled else None
    found = fit._sums(weighted, residual, factor, per_scale)
    with monkeypatch.context() as plain:
        plain.setattr(fit.cpu, "missing", lambda: "is left out")
        assert torch.equal(fit._sums(weighted, residual, factor, per_scale), found)
    expected = fit.plain_sums(weighted, residual, factor, per_scale)
    errors = fit.within_blocks(residual.contiguous(), factor.diagonal_blocks(8))
    some = torch.cat(weighted).float() * (1.0 if per_scale is None else per_scale)
    terms = factor.curvature @ (some.abs() * (some.abs() + errors.abs()))
    assert ((found[0] - expected[0]).abs() <= 2e-6 * terms).all()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [30, 600])  # a factor of tokens, and a dense one
def test_scales_of_narrow_products(tokens: int) -> None:
    """Products of bfloat16 numbers change scales by a hundredth of a rounding, and no code."""
    inputs = Inputs(128, "cpu", "trellis", False, tokens=tokens)
    inputs.add(correlated(tokens, 128), None)
    factor = inputs.factor(0.01)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    given = [
        Unrounded(weight, codec_of(2.5), factor, dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    wide, narrow = (quantize_together([one])[0] for one in given)
    assert torch.equal(wide.branches, narrow.branches)
    torch.testing.assert_close(narrow.scales, wide.scales, rtol=2**-7, atol=0)  # one step
    assert (narrow.scales != wide.scales).sum() <= 4
    residual = torch.randn(128, 64, generator=torch.Generator().manual_seed(6)) * 0.2
    scales = [
        fit.best_scale(weight, torch.ones(64), residual, factor, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert not torch.equal(*scales)
    torch.testing.assert_close(*scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_experts_are_fitted_with_products_in_the_dtype_of_weights(
    model_folder: Callable[..., Path],
    text_file: Path,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def best_scale(*args: Any) -> Tensor:
        seen.append(args[-1])
        return fit.best_scale(*args)

    monkeypatch.setattr(trellis_rounding, "best_scale", best_scale)
    monkeypatch.setattr(sweep, "COLUMNS_IN_16_BITS", 16)
    source = Source(model_folder())
    weights = ExpertWeights(*(x if x is None else x.to(dtype) for x in source.expert(0, 0)))
    states = torch.randn(100, source.hidden).to(dtype)
    routed = Routed(states, torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, 1))
    module = source.model.get_submodule(source.experts[0].path)
    recipe = small_recipe(text_file, expert_codec="trellis", expert_bits=(2,))
    expert = RoutedExpert(0, 0, module, weights, routed)
    round_experts([expert], Rounding.of_experts(recipe, "gptq"), [(2, 2)])
    assert seen == [dtype, dtype]


@pytest.mark.parametrize("bits", [1, 2])
def test_feedback_loses_less_than_none_and_than_scalar_gptq(bits: float) -> None:
    if cpu.missing():
        pytest.skip(f"the library {cpu.missing()}")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    x = correlated(400, 128)
    rotated, plain = Hessian(128, "cpu"), Hessian(128, "cpu")
    rotated.add(trellis.rotate(x))
    plain.add(x)
    factor = rotated.factor(0.01)
    ours = quantize_matrix("gptq", weight, codec_of(bits, 128), factor)
    again = quantize_matrix("gptq", weight, codec_of(bits, 128), factor)
    assert torch.equal(ours.pack(), again.pack())
    without = quantize_matrix("rtn", weight, codec_of(bits, 128))
    scalar = quantize_matrix("gptq", weight, Codec(bits, 128), plain.factor(0.01))
    losses = [squared_error(weight, m.dequantize(), x) for m in (ours, without, scalar)]
    assert losses[0] < 0.8 * min(losses[1:])


def test_scales_are_the_best_for_their_codes() -> None:
    """Least squares under the damped Hessian, row by row.

    A product <a, b>_H in float32 has an error of at most `roundings` UNIT times
    (|a| . sqrt(diag H)) (|b| . sqrt(diag H)): those of H and its factor (`assert_factor_of`), two
    sums with the factor and one of the products, and the six steps of the rotation.
    """
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(2))
    x = trellis.rotate(correlated(300, 64))
    hessian = Hessian(64, "cpu")
    hessian.add(x)
    matrix = quantize_matrix("gptq", weight, codec_of(2), hessian.factor(0.1))
    c = trellis.code_matrix(matrix.branches, 2)[:70].double()
    w, h = trellis.rotate(weight.double()), dense_hessian(x, 0.1)
    product, energy = ((part @ h * c).sum(1) for part in (w, c))
    best = product / energy
    roundings = 300 + 4 * 64 + 16
    length_w, length_c = (part.abs() @ h.diagonal().sqrt() for part in (w, c))
    inexact = roundings * UNIT * length_c * (length_w + best.abs() * length_c) / energy
    assert ((matrix.scales.double() - best).abs() <= BFLOAT16_UNIT * best + inexact).all()
    assert (inexact < 0.01 * best).all()  # or the test would say little


def test_zero_rows_stay_zero_and_bad_weights_are_refused() -> None:
    weight = torch.randn(66, 32, generator=torch.Generator().manual_seed(3))
    weight[65] = 0
    assert quantize_trellis(weight, codec_of(2), None).dequantize()[65].eq(0).all()
    weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        quantize_trellis(weight, codec_of(2), None)
    with pytest.raises(InputError, match="scalar codes only"):
        quantize_matrix("sign", weight, codec_of(1))


# Operations


def exact_weights(packed: Tensor, rows: int, cols: int, codec: Codec) -> Tensor:
    """The weights of a packed matrix, rotated back in float64, where `dequantize` has float32."""
    parts = [part for _, part in trellis.strips(packed, rows, cols, codec)]
    return trellis.rotate_back(torch.cat(parts).double())


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_linear_is_the_matrix(bits: float) -> None:
    codec, rows, cols = codec_of(bits), 70, 96
    packed = random_packed(rows, cols, codec)
    weight = exact_weights(packed, rows, cols, codec)
    x = torch.randn(3, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = kernels.linear(x, packed, None, rows, codec.number, 32, 8, "trellis")
    torch.testing.assert_close(y, x @ weight.T)  # float64 on both sides


@pytest.mark.usefixtures("reference_backend")
def test_experts_are_their_matrices() -> None:
    hidden, inner, experts = 64, 96, 3
    specs = PackedSpec((1.5, 2, 4), 32, "trellis"), PackedSpec((3, 2.5, 1), 32, "trellis")
    shapes = (2 * inner, hidden), (hidden, inner)
    parts = [
        [random_packed(*shape, codec, seed) for seed, codec in enumerate(spec.codecs)]
        for spec, shape in zip(specs, shapes, strict=True)
    ]
    weights = [
        [exact_weights(p, *shape, codec) for p, codec in zip(ps, spec.codecs, strict=True)]
        for ps, spec, shape in zip(parts, specs, shapes, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, hidden, dtype=torch.float64, generator=generator)
    index = torch.randint(experts, (5, 2), generator=generator)
    share = torch.rand(5, 2, dtype=torch.float64, generator=generator)
    tables = [torch.tensor(s.table(*shape)) for s, shape in zip(specs, shapes, strict=True)]
    y = kernels.experts(
        x, index, share, torch.cat(parts[0]), torch.cat(parts[1]), *tables, inner, 32, 32, "silu",
        8, "trellis",
    )  # fmt: skip
    expected = torch.zeros_like(x)
    for t, slot in itertools.product(range(5), range(2)):
        e = int(index[t, slot])
        gate, up = (x[t] @ weights[0][e].T).chunk(2)
        expected[t] += share[t, slot] * (torch.nn.functional.silu(gate) * up) @ weights[1][e].T
    torch.testing.assert_close(y, expected)  # float64 on both sides


# Whole folders


@pytest.fixture(scope="module")
def compressed(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("trellis") / "model"
    recipe = small_recipe(text_file, bits=2.5, expert_codec="trellis", expert_bits=(2, 2.5, 3.5))
    return compress(model_folder(), out, recipe)


def test_a_compressed_folder_holds_rounded_experts(
    compressed: Path, model_folder: Callable[..., Path]
) -> None:
    config = load_json(compressed / "config.json")["quantization_config"]
    assert config["format_version"] == 6
    source, specs = Source(model_folder()), packed_specs(compressed)
    assert any(spec.has_half_widths for spec in specs.values())
    plan = BitAllocation.load(compressed / "moepress_plan.json")
    assert [width_number(bits) for bits in plan.bits[0, :, 0]] == [
        number for _, number in specs[source.experts[plan.layers[0]].parameters[0]].table(64, 64)
    ]
    model = AutoModelForCausalLM.from_pretrained(compressed)
    for experts in source.experts.values():
        spec = specs[f"{experts.path}.gate_up_proj"]
        assert spec.family == "trellis"
        blob = model.get_parameter(f"{experts.path}.gate_up_proj")
        starts = spec.offsets(*experts.gate_up_shape)
        for index, codec in enumerate(spec.codecs):
            found = reference.dequantize(
                blob[starts[index] : starts[index + 1]], *experts.gate_up_shape, codec
            )
            weight = source.expert(experts.layer, index).gate_up
            # Feedback raises the error of the weights to lower that of the outputs.
            assert (found - weight).norm() < 2 * DISTORTION[codec.bits] ** 0.5 * weight.norm()


def test_a_folder_of_scalar_codes_stays_version_1(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out = compress(model_folder(), tmp_path / "out", small_recipe(text_file, bits=2.5))
    config = load_json(out / "config.json")["quantization_config"]
    assert config["format_version"] == 1
    assert all("family" not in fields for fields in config["modules"].values())


def test_the_codec_of_scores_and_recipe_must_agree(compressed: Path) -> None:
    scores = ExpertScores.load(compressed / "moepress_scores.safetensors")
    with pytest.raises(InputError, match="expert_codec int"):
        allocate(scores, Recipe(expert_codec="int", bits=2.5, group_size=32, expert_bits=(2,)))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"expert_codec": "vector"}, "expert_codec is 'vector'"),
        ({"expert_codec": "trellis", "expert_bits": (2, 8)}, "expert_bits is 8"),
        ({"expert_codec": "trellis", "quantizer": "gptq-released"}, "scalar codes only"),
    ],
)
def test_contradictory_recipes_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe().with_changes(**changes)
