"""Small operations of decoding, as torch.library ops: each takes transformers several kernels.

    moepress::rms_norm     root mean square norm of a row
    moepress::rotary       rotary embedding of queries and keys
    moepress::cache_write  one token into a cache, at a position that the device knows
    moepress::route        a router: logits, and which experts a token gets

As those of ops.py, they take flat arguments, and the fakes compute result shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.kernels import router
from moepress.kernels.backends import backend_for
from moepress.kernels.checks import check_one_device
from moepress.kernels.op import op
from moepress.kernels.router import Formula
from moepress.kernels.small_reference import FORMULAS, STYLES


@op("moepress::rms_norm")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times a weight. Sums are float32.

    Args:
        x: [.., D], any float dtype.
        weight: [D], any float dtype; None: without.
        eps: added to the mean of squares.
        formula: one of FORMULAS of small_reference.py: what is rounded when. Without a weight it
            does not matter.

    Returns:
        [.., D], contiguous, in the dtype of x; with "rounded" in the wider dtype of x and weight.

    Raises:
        InputError: a shape, dtype or device does not fit, or there is no such formula.
    """
    if formula not in FORMULAS:
        raise InputError(f"No formula '{formula}' of a norm. Expected one of {list(FORMULAS)}.")
    floats = x.is_floating_point() and (weight is None or weight.is_floating_point())
    if not floats or not x.dim() or (weight is not None and weight.shape != x.shape[-1:]):
        given = None if weight is None else f"{list(weight.shape)} {weight.dtype}"
        raise InputError(
            f"Expected x [.., D] and weight [D], floats; got {list(x.shape)} {x.dtype} and {given}."
        )
    check_one_device(x, weight=weight)
    return backend_for(x.device).rms_norm(x, weight, eps, formula).contiguous()


@rms_norm.op.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> Tensor:
    both = weight is not None and formula == "rounded"
    dtype = torch.promote_types(x.dtype, weight.dtype) if both and weight is not None else x.dtype
    return x.new_empty(x.shape, dtype=dtype)


@op("moepress::rotary")
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str, wide: bool
) -> tuple[Tensor, Tensor]:
    """Turn pairs of numbers of queries and keys by the angles of their positions.

    Args:
        q, k: [B, Hq, T, D] and [B, Hk, T, D] of one float dtype, any strides. Either may have no
            heads.
        cos, sin: [B or 1, T, columns], a float dtype; that of q unless `wide`.
        style: a key of STYLES of small_reference.py: which numbers are pairs, and which column has
            their angle. Numbers of a head that do not turn are copied.
        wide: products and sums in float32, rounded once; else each rounded to the dtype of q.

    Returns:
        As q and as k, with their strides where no two of their numbers are at one place.

    Raises:
        InputError: a shape, dtype or device does not fit, or there is no such style.
    """
    if style not in STYLES:
        raise InputError(f"No style '{style}' of a rotary embedding. Expected {list(STYLES)}.")
    _check_rotary(q, k, cos, sin, STYLES[style].rotated(cos.shape[-1]), wide)
    check_one_device(q, k=k, cos=cos, sin=sin)
    return backend_for(q.device).rotary(q, k, cos, sin, style, wide)


def _check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int, wide: bool) -> None:
    fits = (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2]
        and rotated % 2 == 0
        and rotated <= q.shape[3]
        and q.is_floating_point()
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and (wide or cos.dtype == q.dtype)
    )
    if not fits:
        raise InputError(
            "Expected q [B, Hq, T, D], k [B, Hk, T, D] of one dtype, and cos, sin [B or 1, T, "
            "columns], of that dtype too unless `wide`; got "
            + ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, cos, sin))
        )


@rotary.op.register_fake
def _(q: Tensor, k: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@op("moepress::cache_write", mutates=("keys", "values"))
def cache_write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
    """Write one token of every sequence into a cache.

    Args:
        keys, values: [B, H, room, D] and [B, H, room, D'], any dtype; changed.
        key, value: [B, H, 1, D] and [B, H, 1, D'] of the token, in the dtypes of keys, of values.
        position: where: one int64 on the device, 0 to room - 1.

    Raises:
        InputError: a shape, dtype or device does not fit. A position outside of the room is an
            error of the device.
    """
    fits = all(
        held.dim() == 4
        and one.shape == (*held.shape[:2], 1, held.shape[3])
        and one.dtype == held.dtype
        for held, one in ((keys, key), (values, value))
    )
    if not fits or keys.shape[:3] != values.shape[:3]:
        raise InputError(
            "Expected keys and values [B, H, room, D], and a token [B, H, 1, D] for each, of its "
            "dtype; got "
            + ", ".join(f"{list(x.shape)} {x.dtype}" for x in (keys, values, key, value))
        )
    if position.dtype != torch.int64 or position.numel() != 1:
        raise InputError(
            f"position must be one int64, got {list(position.shape)} {position.dtype}."
        )
    check_one_device(keys, values=values, key=key, value=value, position=position)
    backend_for(keys.device).cache_write(keys, values, key, value, position)


@cache_write.op.register_fake
def _(*_: object, **__: object) -> None: ...


@op("moepress::route")
def route(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    score: str,
    normalise: bool,
    epsilon: float,
    scale: float,
    groups: int,
    kept_groups: int,
    group_best: int,
    product_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    score_dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """A router: which experts each token gets, and with what weights.

    Args:
        hidden: [T, H], any float dtype.
        weight: [E, H], any float dtype.
        bias: [E] of the logits, or None.
        correction: [E] that is added to scores for the choice alone, or None.
        top_k: k.
        score and all that follow: the fields of `Formula`, described there.

    Returns:
        logits [T, E], weights [T, k], and indices [T, k] int64 in the order of the choice: the
        greatest first, of equal ones the one of the lower index.

    Raises:
        InputError: a shape or device does not fit, or there is no such formula.
    """
    formula = Formula(
        score,
        normalise,
        epsilon,
        scale,
        groups,
        kept_groups,
        group_best,
        product_dtype,
        logits_dtype,
        score_dtype,
        weights_dtype,
    )
    router.check(hidden, weight, bias, correction, top_k, formula)
    check_one_device(hidden, weight=weight, bias=bias, correction=correction)
    return backend_for(hidden.device).route(hidden, weight, bias, correction, top_k, formula)


@route.op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    *fields: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, formula = len(hidden), Formula(*fields, **named)
    return (
        hidden.new_empty(tokens, len(weight), dtype=formula.logits_dtype),
        hidden.new_empty(tokens, top_k, dtype=formula.weights_dtype),
        hidden.new_empty(tokens, top_k, dtype=torch.int64),
    )
