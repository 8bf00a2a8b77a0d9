"""The operations on packed weights and on routing, as torch.library ops.

    moepress::linear     x W^T + bias, W packed
    moepress::linears    the same for several matrices
    moepress::experts    the routed experts of one layer, each with its own code widths
    moepress::embedding  rows of a packed table
    moepress::drop       remove choices of small routing weight
    moepress::attention  few queries over many keys, with groups of queries that share keys

torch.compile, torch.export and CUDA graphs see each op as one node with a known result shape,
whichever backend runs it (backends.py). torch.library reads the schema of an op from the
annotations of its function, so the ops take flat arguments. The fakes compute result shapes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import Codec, width_of
from moepress.kernels.backends import backend_for
from moepress.kernels.checks import check_bytes, check_floats, check_one_device
from moepress.kernels.experts_call import ExpertsCall, check_experts_call
from moepress.kernels.matrix import PackedMatrix
from moepress.kernels.op import op
from moepress.kernels.reference import check_activation_bits


@op("moepress::linear")
def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    activation_bits: int = 8,
    family: str = "int",
) -> Tensor:
    """x W^T + bias.

    Args:
        x: [..., K], a float dtype.
        packed: [Codec(bits, group_size, family).nbytes(N, K)] uint8, docs/format.md.
        bias: [N] in the dtype of x, or None.
        out_features: N.
        bits, group_size, family: the codec of W; `bits` as `width_number` of format/codec.py.
        activation_bits: the least precision of activations. 8: a backend may round them to 8-bit
            codes, one scale per group of columns. 16: to 15-bit codes, finer than bfloat16.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        InputError: a shape, dtype or device does not fit, or the codec does not exist.
    """
    check_floats(x)
    codec = _codec(bits, group_size, family)
    check_bytes("weight", packed, codec.nbytes(out_features, x.shape[-1]))
    check_one_device(x, weight=packed, bias=bias)
    check_activation_bits(activation_bits)
    if bias is not None and bias.shape != (out_features,):
        raise InputError(f"bias must be [{out_features}], got {list(bias.shape)}.")
    return backend_for(x.device).linear(x, packed, bias, out_features, codec, activation_bits)


@linear.op.register_fake
def _(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *_: object, **__: object
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@op("moepress::linears")
def linears(
    x: Tensor,
    packed: list[Tensor],
    out_features: list[int],
    bits: list[int],
    group_size: int,
    activation_bits: int = 8,
    family: str = "int",
) -> Tensor:
    """x W_i^T for matrices with the same inputs, such as those of queries, keys and values.

    A backend may round the inputs once, and multiply all in one launch. Not differentiable.

    Args:
        packed, out_features, bits: of each matrix W_i [N_i, K], as of `linear`.
        group_size, family: of all their codecs.

    Returns:
        [..., sum of N_i] in the dtype of x, one after another.

    Raises:
        InputError: as `linear`; or there is no matrix, or the lists differ in length.
    """
    if not packed or not len(packed) == len(out_features) == len(bits):
        raise InputError(
            "Expected as many weights as rows and widths, at least one; got "
            f"{len(packed)}, {len(out_features)} and {len(bits)}."
        )
    check_floats(x)
    matrices = [
        PackedMatrix(weight, rows, _codec(number, group_size, family))
        for weight, rows, number in zip(packed, out_features, bits, strict=True)
    ]
    for m in matrices:
        check_bytes("weight", m.weight, m.codec.nbytes(m.rows, x.shape[-1]))
        check_one_device(x, weight=m.weight)
    check_activation_bits(activation_bits)
    backend = backend_for(x.device)
    if backend.linears is not None:
        return backend.linears(x, matrices, activation_bits)
    each = [backend.linear(x, m.weight, None, m.rows, m.codec, activation_bits) for m in matrices]
    return torch.cat(each, -1)


@linears.op.register_fake
def _(x: Tensor, packed: list[Tensor], out_features: list[int], *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(out_features)))


@op("moepress::experts")
def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_table: Tensor,
    down_table: Tensor,
    intermediate_size: int,
    gate_up_group: int,
    down_group: int,
    activation: str,
    activation_bits: int = 8,
    family: str = "int",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limits_output: bool = False,
    gate_softcap: float | None = None,
    up_softcap: float | None = None,
    store: int = 0,
    store_layer: int = 0,
) -> Tensor:
    """y_t = sum_k w_tk (down_e h(gate_e x_t + b, up_e x_t + b') + b''), with e = index_tk.

    h is the function of `Gate`, act(g) * u unless more is given.

    Args: the fields of `ExpertsCall`, described there. None as a limit or a softcap is inf, which
        the schemas of torch.library cannot state.

    Returns:
        [T, H] in the dtype of `hidden`.

    Raises:
        InputError: a shape, dtype or device does not fit, a codec does not exist, a matrix reaches
            outside its packed bytes, or the gate is not supported.
        CheckpointError: an expert of a store cannot be read.
    """
    call = ExpertsCall(
        hidden,
        top_k_index,
        top_k_weights,
        gate_up,
        down,
        gate_up_table,
        down_table,
        intermediate_size,
        gate_up_group,
        down_group,
        activation,
        activation_bits,
        family,
        gate_up_bias,
        down_bias,
        gated,
        math.inf if limit is None else limit,
        alpha,
        up_offset,
        limits_output,
        math.inf if gate_softcap is None else gate_softcap,
        math.inf if up_softcap is None else up_softcap,
        store,
        store_layer,
    )
    check_experts_call(call)
    check_activation_bits(activation_bits)
    return backend_for(hidden.device).experts(call)


@experts.op.register_fake
def _(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


@op("moepress::embedding")
def embedding(
    ids: Tensor,
    packed: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a packed matrix of scalar codes.

    Args:
        ids: [...] int64, each in 0 .. rows - 1.
        packed: [Codec(bits, group_size).nbytes(rows, cols)] uint8, docs/format.md.
        rows, cols: shape of the matrix.
        bits, group_size: the codec of the matrix.
        dtype: that of the result.

    Returns:
        [..., cols] of `dtype`.

    Raises:
        InputError: a size or device does not fit, the codec does not exist, or an id is outside.
    """
    codec = _codec(bits, group_size, "int")
    check_bytes("weight", packed, codec.nbytes(rows, cols))
    check_one_device(ids, weight=packed)
    return backend_for(ids.device).embedding(ids, packed, rows, cols, codec, dtype)


@embedding.op.register_fake
def _(
    ids: Tensor,
    packed: Tensor,
    rows: int,
    cols: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*ids.shape, cols), dtype=dtype)


@op("moepress::drop")
def drop(
    index: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    renormalise: bool,
    keep: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop choices of small routing weight: the choice of rank r where w_r < t_r * w_1.

    Args:
        index: [T, k] int64. An index outside 0 .. E-1 is no expert: its weight counts as 0, and it
            is never dropped.
        weights: [T, k], any float dtype, routing weights in any order.
        thresholds: [k] float32, t_r by rank. The first is 0, or a token may lose all its choices.
        renormalise: whether to scale the remaining weights up to the sum of all.
        keep: [T] bool, protected tokens, which keep all choices; None: no token is protected.
        num_experts: E. A dropped choice gets the index E and the weight 0.

    Returns:
        index [T, k] int64 and weights [T, k], both by falling weight, and dropped [T, k] bool.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    tokens, k = index.shape
    if (
        weights.shape != index.shape
        or thresholds.shape != (k,)
        or thresholds.dtype != torch.float32
    ):
        raise InputError(
            "Expected top_k_index and top_k_weights [T, k] and thresholds [k] float32; got "
            f"{list(index.shape)}, {list(weights.shape)} and {list(thresholds.shape)} "
            f"{thresholds.dtype}."
        )
    if keep is not None and (keep.shape != (tokens,) or keep.dtype != torch.bool):
        raise InputError(f"keep must be [{tokens}] bool, got {list(keep.shape)} {keep.dtype}.")
    check_one_device(index, weights=weights, thresholds=thresholds, keep=keep)
    backend = backend_for(index.device)
    return backend.drop(index, weights, thresholds, renormalise, keep, num_experts)


@drop.op.register_fake
def _(index: Tensor, weights: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    shape = index.shape
    return (
        index.new_empty(shape),
        weights.new_empty(shape),
        index.new_empty(shape, dtype=torch.bool),
    )


@op("moepress::attention")
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) v for few queries. Scores and sums are float32.

    Args:
        q: [B, Hq, T, D], any float dtype. Hq is a multiple of H; query head h has keys h // (Hq/H).
        k, v: [B, H, S, D] in the dtype of q, any strides.
        mask: [B or 1, Hq or 1, T or 1, S or 1], bool (False: not seen) or a float that is added;
            None: every query sees all keys.
        scale: of the scores.

    Returns:
        [B, T, Hq, D], contiguous, in the dtype of q. A query that sees no key gets zeros, as it
        does from torch's own attention.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype
    if not fits or q.shape[::3] != k.shape[::3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise InputError(
            "Expected q [B, Hq, T, D] and k, v [B, H, S, D] of one dtype, Hq a multiple of H; got "
            f"{list(q.shape)} {q.dtype}, {list(k.shape)} {k.dtype} and {list(v.shape)} {v.dtype}."
        )
    full = *q.shape[:3], k.shape[2]
    if mask is not None and (
        mask.dim() != 4 or any(n not in (1, m) for n, m in zip(mask.shape, full, strict=True))
    ):
        raise InputError(f"mask must be broadcastable to {list(full)}, got {list(mask.shape)}.")
    check_one_device(q, k=k, v=v, mask=mask)
    return backend_for(q.device).attention(q, k, v, mask, scale)


@attention.op.register_fake
def _(q: Tensor, *_: object, **__: object) -> Tensor:
    batches, heads, tokens, size = q.shape
    return q.new_empty(batches, tokens, heads, size)


@lru_cache(maxsize=64)
def _codec(number: int, group_size: int, family: str) -> Codec:
    return Codec(width_of(number), group_size, family)
