"""Random parts of matrices and of experts for several devices, beside the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moepress import kernels
from moepress.format.codec import CODE_BITS, FAMILIES, LEFT_OUT, PackedSpec
from moepress.kernels import backends, cuda, reference
from moepress.kernels.expert_shards import cut_experts, keep_experts
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts
from moepress.kernels.shards import cut_columns, cut_rows
from moepress.self_test import row_errors
from tests.kernels.cuda.fuzzing.draw import Draw
from tests.kernels.cuda.fuzzing.products import (
    CODES,
    activation_bits,
    drawn_bytes,
    inputs,
    matrix,
    same_products,
    stored,
)


def matrix_parts(draw: Draw) -> None:
    """Some rows of a matrix, or some of its columns, beside the same of the whole."""
    codec, (rows, cols), whole = matrix(draw, least=1)
    x, bits = inputs(draw, cols), activation_bits(draw)
    by_rows = draw.chance("cut rows", 0.5)
    size = rows if by_rows else cols
    first = draw.integer("first", 0, size - 1)
    wanted = range(first, draw.integer("stop", first + 1, size))
    if by_rows:
        cut = cut_rows(whole, rows, cols, codec, wanted)
        found = cuda.linear(x, stored(draw, cut.packed), None, cut.size, codec, bits)
        found = found[:, cut.before : cut.before + len(wanted)]
        same_products(found, x, whole, None, codec, bits, rows=(wanted, rows))
        return
    cut = cut_columns(whole, rows, cols, codec, wanted)
    x, some = x.nan_to_num(0, 0, 0), torch.zeros_like(x)
    columns = slice(wanted.start, wanted.stop)
    some[:, columns] = x[:, columns]
    part = x.new_zeros(len(x), cut.size)
    part[:, cut.before : cut.before + len(wanted)] = x[:, columns]
    found = cuda.linear(part, stored(draw, cut.packed), None, rows, codec, bits)
    same_products(found, some, whole, None, codec, bits)


def expert_parts(draw: Draw) -> None:
    """Parts of a layer's experts for some ranks, whose outputs add up."""
    whole = _module(draw)
    tokens, k = draw.tokens(20), draw.integer("k", 1, 4)
    hidden = draw.normal(tokens, whole.hidden_size)
    index = draw.integers(-1, whole.num_experts, tokens, k)
    given = hidden, index, draw.uniform(tokens, k)
    wanted = _outputs(whole, "reference", given)
    ranks = draw.integer("ranks", 1, 4)
    total = torch.zeros_like(wanted)
    by_units = draw.chance("cut", 0.7)
    for rank in range(ranks):
        part = copy.deepcopy(whole)
        if by_units:
            if not cut_experts(part, rank, ranks):
                draw.note("cut", "impossible")
                return
        else:
            keep_experts(part, range(rank, whole.num_experts, ranks))
        total += _outputs(part, "cuda", given)
    if not tokens:
        return
    errors = row_errors(total, wanted)
    assert errors.max() <= CODES[whole.activation_bits], f"error {errors.max():.2g} of a token"


def _module(draw: Draw) -> PackedExperts:
    family, count = draw.one("family", FAMILIES), draw.integer("experts", 1, 5)
    groups = [draw.one(f"group {i}", (32, 64, 128)) for i in range(2)]
    hidden = groups[0] * draw.integer("hidden / group", 1, 256 // groups[0])
    inner = draw.one("inner", (256, 512, 768, 1024, 384, 640, 1536))
    left_out = (draw.uniform(count) < 0.2).tolist()
    specs = [
        PackedSpec(
            tuple(
                LEFT_OUT if none else bits
                for none, bits in zip(
                    left_out, draw.some(f"widths {i}", CODE_BITS[family], count), strict=True
                )
            ),
            group,
            family,
        )
        for i, group in enumerate(groups)
    ]
    gate = draw.one(
        "gate", (Gate("silu"), Gate("relu2", gated=False), Gate("silu", limit=1.0, alpha=1.7))
    )
    biased = draw.chance("biased", 0.3)
    made = PackedExperts(count, hidden, inner, specs[0], specs[1], gate, biased, biased)
    made.activation_bits = activation_bits(draw)
    names = made.first_name, "down_proj"
    for spec, shape, name in zip(specs, made.shapes, names, strict=True):
        made.get_parameter(name).data = drawn_bytes(draw, spec, *shape)
        if biased:
            bias = made.get_parameter(f"{name}_bias")
            bias.data = draw.normal(*bias.shape)
    return made


def _outputs(module: PackedExperts, backend: str, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with _alone(backend), torch.inference_mode():
        y: Tensor = module(*given)
    return y.clone()


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """The kernels for cards on CPU tensors, or the reference with rounded activations."""
    with backends.only(name):
        given = backends.BACKENDS[name]
        if name == "reference":
            given = replace(given, experts=partial(reference.experts, rounded=True))
        kernels.register_backend(replace(given, device_types=("cpu",), refuses=lambda device: None))
        yield


CASES: dict[str, Callable[[Draw], None]] = {
    "matrix_parts": matrix_parts,
    "expert_parts": expert_parts,
}
