"""The ops in plain PyTorch: the definition of correct, which other backends are tested against.

scalar.py and trellis.py decode packed matrices some rows at a time, so memory beside the result
stays near their `STRIP_WEIGHTS` floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError
from moepress.format.codec import LEFT_OUT, Codec, width_of
from moepress.kernels import scalar, trellis
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.gate import Gate
from moepress.kernels.stores import held

ACTIVATION_RANGE = {8: 127.0, 16: 128.0 * 127.0}  # activation bits to the largest code

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {  # by their names in transformers' ACT2FN
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def dequantize(
    packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [N, K] that a packed matrix stands for.

    Scalar codes: w = scale * (code - zero), zero = zero_code * levels / 255 (symmetric codecs:
    levels / 2). Each operation is rounded to float32, and the result is cast to `dtype`.
    Trellis codes: kernels/trellis.py.

    Raises:
        InputError: the number of bytes is not that of such a matrix.
    """
    out = packed.new_empty((rows, cols), dtype=dtype)
    for start, weights in _strips(packed, rows, cols, codec):
        if codec.family == "trellis":
            weights = trellis.rotate_back(weights)
        out[start : start + len(weights)] = weights
    return out


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    codec: Codec,
    activation_bits: int = 16,
    *,
    rounded: bool = False,
    values: trellis.Values = "exact",
) -> Tensor:
    """x W^T + bias with W packed: x [..., K] to [..., N], in the dtype of x.

    Args:
        activation_bits: see `rounded`.
        rounded: round activations to `activation_bits` first (trellis codes: the rotated ones), as
            kernels that multiply integers do; tests use this as their oracle. Otherwise activations
            keep their dtype, which satisfies any `activation_bits`.
        values: of trellis codes; others than "exact" are the oracle of kernels that take those.
    """
    if codec.family == "trellis":
        x = trellis.rotate(x)
    if rounded:
        x = round_activations(x, codec.group_size, activation_bits)
    out = x.new_empty((*x.shape[:-1], out_features))
    for start, weights in _strips(packed, out_features, x.shape[-1], codec, values):
        rows = slice(start, start + len(weights))
        out[..., rows] = F.linear(x, weights.to(x.dtype), None if bias is None else bias[rows])
    return out


def linear_transposed(y: Tensor, packed: Tensor, in_features: int, codec: Codec) -> Tensor:
    """y W with W packed: y [..., N] to [..., K], in the dtype of y; sums are in float32."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros((*y.shape[:-1], in_features), dtype=wide)
    for start, weights in _strips(packed, y.shape[-1], in_features, codec):
        out += y[..., start : start + len(weights)] @ weights.to(y.dtype)
    return (trellis.rotate_back(out) if codec.family == "trellis" else out).to(y.dtype)


def experts(
    call: ExpertsCall,
    *,
    rounded: bool = False,
    values_of: Callable[[int], trellis.Values] = lambda tokens: "exact",
) -> Tensor:
    """Routed experts, as the op `moepress::experts`; `rounded` as in `linear`.

    `values_of`: the `values` of `linear` for an expert with so many tokens.

    Experts run one after another. Experts without a token are not unpacked, experts of 0 bits add
    nothing. Products are in the dtype of `hidden`, sums over k in float32 or wider.
    """
    hidden, width, inner = call.hidden, call.hidden.shape[1], call.intermediate_size
    k, weights = call.top_k_index.shape[1], call.top_k_weights.flatten()
    gate, bits, rows = call.gate, call.activation_bits, call.rows
    activation_function(call.activation)  # raises InputError for an unknown name
    total = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    gate_up_table, down_table = call.gate_up_table.tolist(), call.down_table.tolist()
    for expert, slots in slots_by_expert(call.top_k_index, len(gate_up_table)):
        first, second = (
            gate_up_table[expert],
            down_table[expert],
        )  # [first byte, `width_number`]
        if first[1] == second[1] == LEFT_OUT:
            continue
        gate_up, gate_up_codec = _matrix(
            call.gate_up, first, call.gate_up_group, call.family, rows, width
        )
        down, down_codec = _matrix(call.down, second, call.down_group, call.family, width, inner)
        token = slots // k
        values = values_of(len(slots))
        product = partial(linear, activation_bits=bits, rounded=rounded, values=values)
        with held(call.store, call.store_layer, expert):
            bias = _of_expert(call.gate_up_bias, expert, hidden)
            x = product(hidden[token], gate_up, bias, rows, gate_up_codec)
            bias = _of_expert(call.down_bias, expert, hidden)
            y = product(gated(gate, x), down, bias, width, down_codec)
        total.index_add_(0, token, y.to(total.dtype) * weights[slots].to(total.dtype)[:, None])
    return total.to(hidden.dtype)


def gated(gate: Gate, x: Tensor) -> Tensor:
    """h of the first products of experts: [..., R] to [..., I], in the dtype of x.

    R = 2I, g before u; I without a gate. `Gate` has the formula. Softcaps are computed in float32
    or wider, as transformers does.
    """
    g, u = x.chunk(2, dim=-1) if gate.gated else (x, None)
    wide = torch.promote_types(x.dtype, torch.float32)
    if gate.gate_softcap != math.inf:
        g = g.to(wide)
    if gate.up_softcap != math.inf and u is not None:
        u = u.to(wide)
    if gate.limit != math.inf and not gate.limits_output:
        g = g.clamp(max=gate.limit)
    if gate.gate_softcap != math.inf:
        a = _softcap(g, gate.gate_softcap) * torch.sigmoid(gate.alpha * g)
    elif gate.alpha != 1:
        a = g * torch.sigmoid(gate.alpha * g)
    else:
        a = activation_function(gate.activation)(g)
    if gate.limits_output:
        a = a.clamp(max=gate.limit)
    if u is None:
        return a.to(x.dtype)
    if gate.limit != math.inf:
        u = u.clamp(-gate.limit, gate.limit)
    return (a * (_softcap(u, gate.up_softcap) + gate.up_offset)).to(x.dtype)


def round_activations(x: Tensor, group_size: int, bits: int) -> Tensor:
    """Activations as integer kernels see them: a * q, one scale a per group of columns.

    q = round(x * (R / m)), half to even, and a = m / R, each operation in float32. m is the largest
    |x| of the group, and R = 127 at 8 bits, 128 * 127 at 16. A group with m < 2**-100 becomes 0. An
    infinity or a NaN makes its whole group NaN.

    Args:
        x: [..., K], a float dtype.
        group_size: columns that share a scale; divides K.
        bits: 8 or 16.

    Returns:
        [..., K] in the dtype of x; a * q is one product in that dtype.
    """
    groups = torch.unflatten(x.float(), -1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)  # NaN if the group has one
    span = torch.full_like(largest, ACTIVATION_RANGE[bits])
    usable = (largest >= 2.0**-100) & (largest < torch.inf)
    codes = torch.where(usable, groups * (span / largest), 0).round()
    scale = torch.where(usable, largest / span, 0).masked_fill(~largest.isfinite(), torch.nan)
    return (scale.to(x.dtype) * codes.to(x.dtype)).flatten(-2)


def embedding(
    ids: Tensor, packed: Tensor, rows: int, cols: int, codec: Codec, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` of a packed matrix: [...] to [..., cols]. Each row in use is unpacked once."""
    used, place = torch.unique(ids, return_inverse=True)
    if len(used) and not 0 <= int(used[0]) <= int(used[-1]) < rows:
        raise InputError(
            f"Embedding ids run from {int(used[0])} to {int(used[-1])}; expected 0 to {rows - 1}. "
            "The tokenizer does not belong to this model."
        )
    return scalar.some_rows(packed, rows, cols, codec, used).to(dtype)[place]


def drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop choices of small routing weight, as the op `moepress::drop`."""
    none = (index < 0) | (index >= num_experts)  # choices that are no expert
    ranked, order = weights.masked_fill(none, 0).sort(dim=1, descending=True, stable=True)
    dropped = (ranked < thresholds * ranked[:, :1]) & ~none.gather(1, order)
    if keep is not None:
        dropped &= ~keep[:, None]
    kept = ranked.masked_fill(dropped, 0)
    if renormalise:
        kept = with_sum_of(ranked, kept)
    return index.gather(1, order).masked_fill(dropped, num_experts), kept, dropped


def with_sum_of(weights: Tensor, kept: Tensor) -> Tensor:
    """Kept routing weights [T, k], scaled up to the sum of all `weights` [T, k] of their token.

    Those of a token that are all 0 stay 0.
    """
    # float32: the roundings of sums and of quotients in bfloat16 add up to a percent.
    left, total = (w.float().sum(1, keepdim=True) for w in (kept, weights))
    # Quotients are taken of what is not 0: else gradients would be 0 / 0.
    scale = torch.where(left > 0, total, 1) / torch.where(left > 0, left, 1)
    return (kept * scale).to(weights.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) v, as the op `moepress::attention`, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v))
    scores = q.to(wide) @ keys.transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    blind = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees nothing
    weights = torch.softmax(scores, -1).masked_fill(blind, 0)
    return (weights @ values).transpose(1, 2).to(q.dtype).contiguous()


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name.

    Raises:
        InputError: the name is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise InputError(
            f"Activation '{name}' is not supported. Expected one of {sorted(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def check_activation_bits(bits: int) -> None:
    """Raise InputError if activations cannot be rounded to that many bits."""
    if bits not in ACTIVATION_RANGE:
        raise InputError(f"activation_bits is {bits}. Expected one of {sorted(ACTIVATION_RANGE)}.")


def _strips(
    packed: Tensor, rows: int, cols: int, codec: Codec, values: trellis.Values = "exact"
) -> Iterator[tuple[int, Tensor]]:
    """Weights, some rows at a time: (first row, [n, K] float32). Trellis weights stay rotated."""
    if codec.family == "trellis":
        return trellis.strips(packed, rows, cols, codec, values)
    return scalar.strips(packed, rows, cols, codec)


def _matrix(
    packed: Tensor, entry: list[int], group_size: int, family: str, rows: int, cols: int
) -> tuple[Tensor, Codec]:
    """The bytes and the codec of one expert's matrix; `entry`, its row of the table."""
    offset, number = entry
    codec = Codec(width_of(number), group_size, family)
    return packed[offset : offset + codec.nbytes(rows, cols)], codec


def _softcap(x: Tensor, cap: float) -> Tensor:
    return x if cap == math.inf else cap * torch.tanh(x / cap)


def _of_expert(bias: Tensor | None, expert: int, like: Tensor) -> Tensor | None:
    """The bias of one expert in the dtype of `like`."""
    return None if bias is None else bias[expert].to(like.dtype)


def slots_by_expert(index: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its positions in the flattened [T, k] index), for each expert that was chosen.

    Entries of `index` outside 0 .. count-1 are ignored.
    """
    flat = index.flatten()
    slots = ((flat >= 0) & (flat < count)).nonzero().squeeze(1)
    slots = slots[flat[slots].argsort(stable=True)]
    used, hits = torch.unique_consecutive(flat[slots], return_counts=True)
    yield from zip(used.tolist(), slots.split_with_sizes(hits.tolist()), strict=True)
