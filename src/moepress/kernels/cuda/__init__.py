"""The operations on NVIDIA cards: kernels in CUDA C++ in this folder, compiled when first used.

Activations are rounded to integer codes, one scale for each group of columns, and multiplied with
the packed codes by the tensor cores: exact in 32-bit integers, and summed over groups in float32.
The oracle of this arithmetic is `reference.linear(..., rounded=True)`. Nothing here waits for the
card or reads from it, so the operations can be captured in CUDA graphs. A token's result does not
depend on the other tokens of a call beyond the choice of a kernel, which is made from shapes.

    launch.py, compiler.py   how a .cu file becomes a kernel that runs
    products.py              which kernel multiplies, and its grid
    codes.py                 activations as integer codes
    inputs.cu                inputs rotated and rounded (rounding.cuh); (token, choice) pairs sorted
                             by expert and cut into panels (routing.cuh)
    gated.cu                 the activation function of experts; the same rounding
    gated_any.cu, gates.py   the same with biases, and any gate (gate.cuh)
    trellis_decode.cu, trellis_prefill.cu, scalar_decode.cu, scalar_prefill.cu
                             products with few and with many tokens
    several.py, trellis_decode_several.cu  several matrices with the same few tokens
    combine.cu               sums of splits and of experts, bias, dtype of the result
    grouped.py               very many tokens: weights decoded to bfloat16, and torch's products
    dequantize.cu, grouped.cu, grouped_any.cu  its kernels
    embedding.cu, drop.cu    rows of a packed table; online pruning
    attention.py             attention of few tokens: attention.cu, attention_plain.cu (float32),
                             attention_merge.cu
    small.py                 small operations of decoding: rms_norm.cu, rotary.cu, cache_write.cu
    router.py                routers of few tokens: route.cu (choice.cuh)
    device.h                 what kernels need beyond plain C++; tests/kernels/cuda emulates it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import FAMILIES, Codec
from moepress.kernels import reference
from moepress.kernels.cuda import grouped, several
from moepress.kernels.cuda.attention import attention
from moepress.kernels.cuda.codes import Codes
from moepress.kernels.cuda.gates import (
    ACTIVATIONS,
    bias_arguments,
    gate_arguments,
    plain_activation,
)
from moepress.kernels.cuda.launch import DTYPES, Launcher, aligned, launcher_for, missing
from moepress.kernels.cuda.products import Product, product
from moepress.kernels.cuda.router import route
from moepress.kernels.cuda.small import cache_write, rms_norm, rotary
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.matrix import PackedMatrix

__all__ = [
    "ACTIVATIONS",
    "attention",
    "cache_write",
    "drop",
    "embedding",
    "experts",
    "linear",
    "linears",
    "missing",
    "rms_norm",
    "rotary",
    "route",
]

PLANES = {8: 1, 16: 2}  # activation bits to bytes of a code
MOST_TOKENS = 1 << 15  # of a call; grids have at most 65535 blocks in some directions
MOST_NUMBERS = 1 << 28  # of a product at a time: 1 GB in float32


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    codec: Codec,
    activation_bits: int,
) -> Tensor:
    """The op `moepress::linear`. Sums are in float32; float64 inputs go to the reference."""
    if x.dtype not in DTYPES:
        return reference.linear(x, packed, bias, out_features, codec)
    if not out_features:
        return x.new_empty(*x.shape[:-1], 0)
    rows, packed = aligned(x.reshape(-1, x.shape[-1])), aligned(packed)
    bias = None if bias is None else _number(bias.contiguous())
    y = x.new_empty(len(rows), out_features)
    step = max(1, min(MOST_TOKENS, MOST_NUMBERS // max(1, out_features)))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        if grouped.takes_linear(rows[part], activation_bits):
            grouped.linear(rows[part], packed, bias, codec, y[part])
        else:
            _linear(rows[part], packed, bias, codec, PLANES[activation_bits], y[part])
    return y.view(*x.shape[:-1], out_features)


def linears(x: Tensor, matrices: Sequence[PackedMatrix], activation_bits: int) -> Tensor:
    """The op `moepress::linears`: [.., sum of rows], as `linear` for each matrix."""
    rows = aligned(x.reshape(-1, x.shape[-1]))
    if x.dtype not in DTYPES or not several.takes(len(rows), matrices):
        each = [linear(x, m.weight, None, m.rows, m.codec, activation_bits) for m in matrices]
        return torch.cat(each, -1)
    given = [replace(m, weight=aligned(m.weight)) for m in matrices]
    y = x.new_empty(len(rows), sum(m.rows for m in matrices))
    if y.numel():
        several.products(rows, given, PLANES[activation_bits], y)
    return y.view(*x.shape[:-1], y.shape[-1])


def experts(call: ExpertsCall) -> Tensor:
    """The op `moepress::experts`. Sums are in float32; float64 inputs go to the reference."""
    hidden = call.hidden
    if hidden.dtype not in DTYPES:
        return reference.experts(call)
    _check(call)
    tokens, k = call.top_k_index.shape
    if not k or not len(call.gate_up_table):
        return torch.zeros_like(hidden)
    given = replace(
        call,
        hidden=aligned(hidden),
        top_k_index=call.top_k_index.long().contiguous(),
        top_k_weights=_number(call.top_k_weights.contiguous()),
        gate_up=aligned(call.gate_up),
        down=aligned(call.down),
        gate_up_table=call.gate_up_table.contiguous(),
        down_table=call.down_table.contiguous(),
        gate_up_bias=_bias(call.gate_up_bias),
        down_bias=_bias(call.down_bias),
    )
    y = torch.empty_like(given.hidden)
    widest = max(call.rows, hidden.shape[1])
    step = max(1, min(MOST_TOKENS, MOST_NUMBERS // (k * widest)))
    if tokens <= step:
        if tokens:
            _experts(given, y)
        return y
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        some = replace(
            given,
            hidden=given.hidden[part],
            top_k_index=given.top_k_index[part],
            top_k_weights=given.top_k_weights[part],
        )
        _experts(some, y[part])
    return y


def embedding(
    ids: Tensor, packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype
) -> Tensor:
    """The op `moepress::embedding`. An id outside the table stops the kernel, as torch's does."""
    if dtype not in DTYPES:
        return embedding(ids, packed, rows, cols, codec, torch.float32).to(dtype)
    out = packed.new_empty((*ids.shape, cols), dtype=dtype)
    if ids.numel():
        launcher_for(ids.device).launch(
            "moepress_embedding",
            (ids.numel(), 1, 1),
            128,
            0,
            (
                ids.long().contiguous(),
                ids.numel(),
                aligned(packed),
                rows,
                cols,
                codec.number,
                codec.group_size,
                out,
                DTYPES[dtype],
            ),
        )
    return out


def drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `moepress::drop`. Weights are compared and scaled in float32."""
    chosen, given = index.long().contiguous(), _number(weights.contiguous())
    tokens, k = chosen.shape
    ranked, kept = torch.empty_like(chosen), torch.empty_like(given)
    dropped = torch.empty_like(chosen, dtype=torch.bool)
    if chosen.numel():
        warps = 4
        launcher_for(index.device).launch(
            "moepress_drop",
            (-(-tokens // warps), 1, 1),
            32 * warps,
            12 * k * warps,
            (
                chosen,
                given,
                DTYPES[given.dtype],
                tokens,
                k,
                num_experts,
                thresholds.contiguous(),
                int(renormalise),
                None if keep is None else keep.contiguous(),
                ranked,
                kept,
                dropped,
            ),
        )
    return ranked, kept.to(weights.dtype), dropped


def _check(call: ExpertsCall) -> None:
    """Check what can be checked without reading from the card; kernels check the tables."""
    reference.activation_function(call.activation)  # raises InputError for an unknown name
    if len(call.gate_up_table) != len(call.down_table):
        raise InputError(
            f"gate_up_table has {len(call.gate_up_table)} experts, down_table "
            f"{len(call.down_table)}."
        )
    if call.family not in FAMILIES:
        raise InputError(f"No codec family '{call.family}'. Expected one of {list(FAMILIES)}.")
    # The group sizes exist and divide the columns:
    Codec(1, call.gate_up_group).groups(call.hidden.shape[1])
    Codec(1, call.down_group).groups(call.intermediate_size)


def _linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, codec: Codec, planes: int, y: Tensor
) -> None:
    """y [T, N] = x [T, K] W^T + bias."""
    tokens, rows = y.shape
    launcher = launcher_for(x.device)
    kernel = product(codec.family, tokens, 1)
    codes = Codes(x, tokens, x.shape[1], codec.group_size, planes, codec.family, kernel.halves)
    codes.round(launcher, x)
    panels = -(-tokens // kernel.panel(planes))
    parts = codes.parts(kernel, rows, panels, launcher)
    splits = parts[1]
    out = x.new_empty((splits, tokens, rows), dtype=torch.float32)
    matrix = _Matrix(packed, bits=codec.number)
    _multiply(launcher, kernel, codes, None, 1, None, (*parts, panels), matrix, out)
    launcher.launch(
        "moepress_combine_linear",
        (-(-rows // 128), tokens, 1),
        128,
        0,
        (
            out,
            splits,
            tokens,
            rows,
            bias,
            0 if bias is None else DTYPES[bias.dtype],
            y,
            DTYPES[y.dtype],
        ),
    )


def _experts(call: ExpertsCall, y: Tensor) -> None:
    """y [T, H] = the routed experts of hidden [T, H]; T and k are not 0."""
    if grouped.takes_experts(call):
        grouped.experts(call, y)
        return
    hidden, inner, weights = call.hidden, call.intermediate_size, call.top_k_weights
    (tokens, k), count = call.top_k_index.shape, len(call.gate_up_table)
    positions, width = tokens * k, hidden.shape[1]
    planes, family = PLANES[call.activation_bits], call.family
    launcher = launcher_for(hidden.device)
    kernel = product(family, positions, count)
    nonempty = min(count, positions)  # the most experts that are chosen
    size = kernel.panel(planes)
    panels = min(positions, nonempty + positions // size)
    busy = max(nonempty, positions // size)  # about how many of them are used

    ints = hidden.new_empty(2 * positions + 3 * panels + 1, dtype=torch.int32)
    pair, position, panel, used = ints.split_with_sizes((positions, positions, 3 * panels, 1))
    inputs = Codes(hidden, tokens, width, call.gate_up_group, planes, family, kernel.halves)
    tables = call.gate_up_table, call.down_table
    sizes = count, size, panels
    routing = call.top_k_index, positions, *tables, *sizes, pair, position, panel, used
    inputs.round(launcher, hidden, routing, count)
    parts = inputs.parts(kernel, call.rows, busy, launcher)
    splits = parts[1]
    first = hidden.new_empty((splits, positions, call.rows), dtype=torch.float32)
    matrix = _Matrix(call.gate_up, call.gate_up_table)
    _multiply(launcher, kernel, inputs, pair, k, panel, (*parts, panels), matrix, first)

    between = Codes(hidden, positions, inner, call.down_group, planes, family, kernel.halves)
    activation = plain_activation(call)
    if activation is None:
        between.any_gate(launcher, first, used, gate_arguments(call, pair))
    else:
        between.glu(launcher, first, used, activation)
    parts = between.parts(kernel, width, busy, launcher)
    splits = parts[1]
    second = hidden.new_empty((splits, positions, width), dtype=torch.float32)
    matrix = _Matrix(call.down, call.down_table)
    _multiply(launcher, kernel, between, None, 1, panel, (*parts, panels), matrix, second)
    weighted = second, splits, positions, position, weights, DTYPES[weights.dtype], k, width
    args: tuple[Tensor | int | None, ...] = *weighted, y, DTYPES[y.dtype]
    name, grid = "moepress_combine_experts", (-(-width // 512), tokens, 1)
    if call.down_bias is not None:
        name, args = f"{name}_biased", (*args, *bias_arguments(call.down_bias), call.top_k_index)
    launcher.launch(name, grid, 128, 0, args)


@dataclass(frozen=True, eq=False)
class _Matrix:
    """Packed matrices, found by their table, or one matrix of a width."""

    packed: Tensor
    table: Tensor | None = None
    bits: int = 0  # where there is no table


def _multiply(
    launcher: Launcher,
    kernel: Product,
    codes: Codes,
    pair: Tensor | None,
    k: int,
    panel: Tensor | None,
    grid: tuple[int, int, int],
    matrix: _Matrix,
    out: Tensor,
) -> None:
    """out [splits, positions, N] = the product of each position with its panel's matrix."""
    splits, positions, rows = out.shape
    cols, group, planes = codes.cols, codes.group, codes.planes
    launcher.launch(
        kernel.name(group, planes),
        grid,
        kernel.threads,
        kernel.shared(cols, group, splits, planes),
        (
            codes.q,
            codes.scale,
            codes.sum,
            planes,
            codes.rows,
            pair,
            k,
            panel,
            positions,
            matrix.packed,
            matrix.packed.numel(),
            matrix.table,
            matrix.bits,
            rows,
            cols,
            group,
            out,
            splits,
        ),
    )


def _bias(x: Tensor | None) -> Tensor | None:
    """x in a dtype and at an address that kernels read."""
    return None if x is None else aligned(_number(x))


def _number(x: Tensor) -> Tensor:
    """x in a dtype that kernels read."""
    return x if x.dtype in DTYPES else x.float()
