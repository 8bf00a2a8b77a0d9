"""Random products of packed matrices, beside kernels/reference.py with rounded activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from unittest.mock import patch

import torch
from torch import Tensor

from moepress.format.codec import CODE_BITS, FAMILIES, GRID_BITS, LEFT_OUT, Codec, PackedSpec
from moepress.kernels import cuda, reference
from moepress.kernels.cuda import grouped, products
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gate import Gate
from moepress.kernels.matrix import PackedMatrix
from moepress.kernels.random_codes import random_packed
from moepress.kernels.reference import ACTIVATIONS, dequantize
from moepress.self_test import row_errors
from tests.kernels.cuda.fuzzing.draw import FLOATS, Draw

SUMS = 2e-6  # what the order of sums in float32 changes, of |x| |w|
CODES = {8: 3e-2, 16: 4e-4}  # what a neighbouring code of one activation changes, of a token
BFLOAT16 = 3e-2  # what products in bfloat16 change
MOST_WEIGHTS = 1 << 16  # of a matrix


def linear(draw: Draw) -> None:
    codec, (rows, cols), packed = matrix(draw)
    x, bits = inputs(draw, cols), activation_bits(draw)
    bias = draw.normal(rows).to(x.dtype) if draw.chance("bias", 0.4) else None
    given = None if bias is None else draw.placed("bias", bias.expand(1, rows))[0]
    with _ways(draw) as by_bfloat16:
        found = cuda.linear(_shaped(draw, x), packed, given, rows, codec, bits)
        found = found.view(len(x), rows)
        by_bfloat16 = by_bfloat16 and bits == 8 and len(x) > 0
    same_products(found, x, packed, bias, codec, bits, by_bfloat16)


def linears(draw: Draw) -> None:
    family = draw.one("family", (*FAMILIES, "trellis"))
    group, cols = _columns(draw)
    count = draw.integer("matrices", 1, 6)
    rows = [draw.random.choice((0, 1, 16, 64, 70, 130, 300, 300)) for _ in range(count)]
    widths = draw.some("bits", CODE_BITS[family], count)
    matrices = []
    for n, bits in zip(draw.note("rows", rows), widths, strict=True):
        spec = PackedSpec((bits,), group, family)
        packed = stored(draw, drawn_bytes(draw, spec, n, cols))
        matrices.append(PackedMatrix(packed, n, spec.codecs[0]))
    x, bits = inputs(draw, cols), activation_bits(draw)
    found = cuda.linears(_shaped(draw, x), matrices, bits).view(len(x), sum(rows))
    for part, m in zip(found.split(rows, 1), matrices, strict=True):
        same_products(part, x, m.weight, None, m.codec, bits)


def same_products(
    found: Tensor,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    codec: Codec,
    bits: int,
    by_bfloat16: bool = False,
    rows: tuple[range, int] | None = None,
) -> None:
    """Compare x W^T + bias with the reference; `rows`: some rows, and of how many they are."""
    kept, count = rows or (range(found.shape[1]), found.shape[1])
    wide, some = x.float(), slice(kept.start, kept.stop)
    wide_bias = None if bias is None else bias.float()
    exact = reference.linear(
        wide, packed, wide_bias, count, codec, bits, rounded=not by_bfloat16
    )[:, some]  # fmt: skip
    assert found.shape == exact.shape and found.dtype == x.dtype
    lengths = dequantize(packed, count, x.shape[1], codec)[some].double().norm(dim=1)
    most = wide.double().norm(dim=1)[:, None] * lengths * (0.01 if by_bfloat16 else SUMS)
    rounded = exact.abs() + (0 if wide_bias is None else wide_bias.abs())
    most = most + rounded * ((2 if by_bfloat16 else 1.01) * torch.finfo(x.dtype).eps)
    _close(found, exact, most + torch.finfo(x.dtype).smallest_normal * 1e-2)


def experts(draw: Draw) -> None:
    call, whole = _experts_call(draw)
    with _ways(draw) as by_bfloat16:
        found = cuda.experts(call)
        by_bfloat16 = by_bfloat16 and call.activation_bits == 8
        again = cuda.experts(_spoiled_no_more(draw, call, whole))
    assert torch.equal(found[whole], again[whole]), "a token changes with another one's numbers"
    exact = reference.experts(replace(call, hidden=call.hidden.float()), rounded=not by_bfloat16)
    assert found.shape == exact.shape and found.dtype == call.hidden.dtype
    assert torch.equal(found.isnan(), exact.isnan()), "NaN elsewhere"
    if not whole.any():
        return
    errors = row_errors(found[whole], exact[whole])
    allowed = BFLOAT16 if by_bfloat16 else CODES[call.activation_bits]
    if by_bfloat16 and draw.parameters["size"] == 300:  # numbers near a gate's limit change sides
        allowed *= 10
    step = 2 * torch.finfo(found.dtype).eps
    assert errors.max() <= allowed + step, f"error {errors.max():.2g} of a token"
    if not by_bfloat16 and call.activation_bits == 8:
        apart = errors > 2e-4 + step
        assert apart.sum() <= 2 + 0.1 * len(errors), f"{apart.sum()} tokens differ"


def embedding(draw: Draw) -> None:
    group, cols = _columns(draw)
    rows = draw.integer("rows", 1, 300)
    spec = PackedSpec((draw.one("bits", GRID_BITS),), group)
    packed = stored(draw, drawn_bytes(draw, spec, rows, cols))
    shape = [draw.random.randint(0, 6) for _ in range(draw.integer("dimensions", 0, 3))]
    ids = draw.placed("ids", draw.integers(0, rows - 1, *draw.note("shape", shape)))
    given = ids, packed, rows, cols, spec.codecs[0], draw.dtype()
    found, exact = cuda.embedding(*given), reference.embedding(*given)
    assert found.dtype == exact.dtype and torch.equal(found, exact)


def drop(draw: Draw) -> None:
    tokens, k, count = draw.tokens(), draw.integer("k", 1, 40), draw.integer("experts", 1, 64)
    dtype = draw.dtype()
    weights = draw.uniform(tokens, k)
    if draw.chance("ties", 0.5):
        weights = (weights * 4).round() / 4
    index = _far_ones(draw, draw.integers(-2, count + 1, tokens, k)).long()
    index = draw.placed("index", index)
    weights = draw.placed("weights", weights.to(dtype))
    thresholds = torch.cat([torch.zeros(1), draw.uniform(k - 1)])
    weights[(index < 0) | (index >= count)] = torch.nan
    keep = draw.uniform(tokens) < 0.3 if draw.chance("keep", 0.5) else None
    given = index, weights, thresholds, draw.chance("renormalise", 0.5), keep, count
    found, exact = cuda.drop(*given), reference.drop(*given)
    assert torch.equal(found[0], exact[0]) and torch.equal(found[2], exact[2])
    assert found[1].dtype == dtype
    close = max(3e-6, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found[1], exact[1], rtol=close, atol=1e-7)


# What cases are made of


def _columns(draw: Draw) -> tuple[int, int]:
    """A group size and a number of columns."""
    group = draw.one("group", (32, 64, 128))
    groups = draw.random.randint(1, draw.random.choice((3, 12, 1536 // group)))
    return group, draw.note("cols", groups * group)


def matrix(draw: Draw, least: int = 0) -> tuple[Codec, tuple[int, int], Tensor]:
    """A codec, at least so many rows, columns, and packed bytes."""
    family = draw.one("family", FAMILIES)
    group, cols = _columns(draw)
    most = max(1, min(draw.random.choice((17, 130, 700)), MOST_WEIGHTS // cols))
    rows = draw.integer("rows", least, most if draw.random.random() < 0.98 else least)
    spec = PackedSpec((draw.one("bits", CODE_BITS[family]),), group, family)
    packed = drawn_bytes(draw, spec, rows, cols)
    return spec.codecs[0], (rows, cols), stored(draw, packed)


def drawn_bytes(draw: Draw, spec: PackedSpec, rows: int, cols: int) -> Tensor:
    """Random packed bytes of matrices, which may have no rows."""
    if not rows:
        return torch.empty(0, dtype=torch.uint8)
    return random_packed(spec, rows, cols, draw.generator)


def stored(draw: Draw, packed: Tensor) -> Tensor:
    """Packed bytes, or a part of a storage, as the files of a model give them."""
    return draw.placed("packed", packed, contiguous=True, unit=draw.random.choice((1, 8, 16, 64)))


def activation_bits(draw: Draw) -> int:
    return draw.one("activation_bits", (8, 16))


def inputs(draw: Draw, cols: int) -> Tensor:
    """[T, K]: rows of several sizes, zeros among them, some not finite.

    Some are so small that they are rounded to zeros: see `reference.round_activations`.
    """
    dtype, tokens = draw.dtype(), draw.tokens()
    x = draw.normal(tokens, cols)
    if draw.chance("sizes", 0.3):
        most = 3 if dtype == torch.float16 else draw.one("most", (1, 15, 32))
        x = x * 10 ** (most * (2 * draw.uniform(tokens, 1) - 1))
        x[draw.uniform(tokens) < 0.2] = 0
    if draw.chance("sizes of groups", 0.2):
        x = (
            x.view(tokens, cols // 32, 32) * 10 ** (-6 * draw.uniform(tokens, cols // 32, 1))
        ).view_as(x)
    x, _ = draw.spoiled(x.to(dtype))
    return x


def _shaped(draw: Draw, x: Tensor) -> Tensor:
    """x [T, K] as [K], [T, 1, K] and the like, anywhere in memory."""
    tokens, cols = x.shape
    shapes = [(tokens, cols), (tokens, cols), (1, tokens, cols), (tokens, 1, cols)]
    if tokens == 1:
        shapes.append((cols,))
    if tokens % 2 == 0:
        shapes.append((2, tokens // 2, cols))
    return draw.placed("x", x.view(draw.one("shape", shapes)))


@contextmanager
def _ways(draw: Draw) -> Iterator[bool]:
    """Other ways through an op now and then: parts of a call; products in bfloat16 (yields True).

    The chunks of rows are small then, so that there are several.
    """
    with ExitStack() as stack:
        if draw.chance("parts", 0.1):
            stack.enter_context(patch.object(cuda, "MOST_TOKENS", draw.integer("most", 1, 20)))
        by_bfloat16 = draw.chance("bfloat16", 0.1)
        if by_bfloat16:
            changes: tuple[tuple[object, str, object], ...] = (
                (grouped, "_new_enough", lambda device: True),
                (grouped, "GRAIN", draw.one("grain", (32, 128))),
                (grouped, "SCRATCH_BYTES", draw.one("scratch", (1, 1 << 16, 1 << 29))),
                (products, "GROUPED_ROWS", 0),
                (products, "GROUPED_PER_EXPERT", 0),
            )
            for owner, name, value in changes:
                stack.enter_context(patch.object(owner, name, value))
        yield by_bfloat16


def _experts_call(draw: Draw) -> tuple[ExpertsCall, Tensor]:
    """A call, and which of its tokens are whole."""
    family, gate = draw.one("family", FAMILIES), _gate(draw)
    groups = [draw.one(f"group {i}", (32, 64, 128)) for i in range(2)]
    hidden, inner = (g * draw.random.randint(1, 512 // g) for g in groups)
    draw.note("sizes", (hidden, inner))
    count = draw.integer("experts", 1, draw.random.choice((2, 9, 9, 70, 300)))
    if count > 20:
        hidden, inner = draw.note("sizes", (groups[0], groups[1]))
    left_out = draw.uniform(count) < draw.one("left out", (0.0, 0.0, 0.3))
    kinds = [draw.random.sample(CODE_BITS[family], draw.random.randint(1, 4)) for _ in range(2)]
    widths = [
        [LEFT_OUT if none else draw.random.choice(some) for none in left_out.tolist()]
        for some in draw.note("widths", kinds)
    ]
    shapes = (gate.parts * inner, hidden), (hidden, inner)
    specs = [PackedSpec(tuple(w), g, family) for w, g in zip(widths, groups, strict=True)]
    packed = [
        stored(draw, drawn_bytes(draw, spec, *shape))
        for spec, shape in zip(specs, shapes, strict=True)
    ]
    order = torch.randperm(count, generator=draw.generator)
    tables = [
        torch.tensor(s.table(*shape))[order] for s, shape in zip(specs, shapes, strict=True)
    ]  # fmt: skip
    tokens, k = draw.tokens(), draw.integer("k", 1, 8)
    index = draw.integers(-1, draw.note("highest", draw.random.randint(0, count)), tokens, k)
    index = _far_ones(draw, index)
    biases: list[Tensor | None] = [None, None]
    for i, (rows, _) in enumerate(shapes):
        if draw.chance(f"bias {i}", 0.3):
            bias = draw.normal(count, rows).to(draw.dtype(f"bias dtype {i}"))
            bias[left_out[order]] = torch.nan
            biases[i] = draw.placed(f"bias {i}", bias)
    dtype = draw.dtype()
    size = draw.one("size", (1, 4) if dtype == torch.float16 else (1, 4, 1e-3, 300))
    x, whole = draw.spoiled((draw.normal(tokens, hidden) * size).to(dtype))
    weights = draw.uniform(tokens, k).to(draw.one("weight dtype", (*FLOATS, torch.float64)))
    weights[(index < 0) | (index >= count)] = torch.nan
    return ExpertsCall(
        draw.placed("x", x),
        draw.placed("index", index),
        draw.placed("weights", weights),
        *packed,
        *tables,
        inner,
        *groups,
        activation_bits=activation_bits(draw),
        family=family,
        gate_up_bias=biases[0],
        down_bias=biases[1],
        **asdict(gate),
    ), whole


def _far_ones(draw: Draw, index: Tensor) -> Tensor:
    """Choices, some of them far from any expert, or in 32 bits."""
    kind = draw.one("indices", ("near", "near", "far", "int32"))
    if kind == "far":
        far = torch.tensor([2**31, 2**32, 2**32 + 1, -(2**32), 2**62, -(2**63)])
        which = far[draw.integers(0, len(far) - 1, *index.shape)]
        return torch.where(draw.uniform(*index.shape) < 0.2, which, index)
    return index.int() if kind == "int32" else index


def _gate(draw: Draw) -> Gate:
    if draw.chance("plain", 0.5):
        return Gate(draw.one("activation", sorted(ACTIVATIONS)))
    activation = draw.one("activation", (*sorted(ACTIVATIONS), *["silu"] * 8))
    gated, silu = draw.random.random() < 0.8, activation == "silu"

    def maybe(wanted: bool, least: float, most: float, without: float) -> float:
        return (
            draw.random.uniform(least, most) if wanted and draw.random.random() < 0.4 else without
        )

    gate = Gate(
        activation,
        gated,
        limit=maybe(True, 0.1, 8, math.inf),
        alpha=maybe(silu, 0.3, 2, 1.0),
        up_offset=maybe(gated, -1, 1, 0.0),
        limits_output=draw.random.random() < 0.3,
        gate_softcap=maybe(silu, 0.3, 5, math.inf),
        up_softcap=maybe(gated, 0.3, 5, math.inf),
    )
    return draw.note("gate", gate)


def _spoiled_no_more(draw: Draw, call: ExpertsCall, whole: Tensor) -> ExpertsCall:
    """The call with contiguous inputs, and other numbers in the tokens that are not whole."""
    hidden = call.hidden.clone(memory_format=torch.contiguous_format)
    hidden[~whole] = 1
    return replace(call, hidden=hidden, top_k_index=call.top_k_index.long().contiguous())


def _close(found: Tensor, exact: Tensor, most: Tensor) -> None:
    """`most`: the difference of each number that is allowed, where it is finite."""
    bad = ~exact.isfinite()
    assert torch.equal(found.isnan(), exact.isnan()), "NaN elsewhere"
    too_great = exact.abs() > 0.99 * torch.finfo(found.dtype).max
    far = ((found.double() - exact.double()).abs() > most) & ~bad & ~too_great
    if far.any():
        at = tuple(far.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(far.sum())} numbers differ, the first at {at}: {float(found[at])}, "
            f"expected {float(exact[at])} up to {float(most[at]):.2g}"
        )


CASES: dict[str, Callable[[Draw], None]] = {
    "linear": linear, "linears": linears, "experts": experts,
    "embedding": embedding, "drop": drop,
}  # fmt: skip
