"""Small operations of decoding on CPUs, one call of the library each (small.cpp).

What it does not take goes to the reference: float64, and numbers of a row that do not follow each
other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels import small_reference as reference
from moepress.kernels.cpu import interface
from moepress.kernels.cpu.interface import NUMBERS
from moepress.kernels.small_reference import FORMULAS, STYLES, Style

WIDE = 8  # of MoepressTurn
MOST_ADDED = 1 << 16  # numbers


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> Tensor:
    """The op `moepress::rms_norm`. Sums have an order of their own, the same on every CPU."""
    numbers, weight_numbers = NUMBERS.get(x.dtype), 0
    dtype, size = x.dtype, x.shape[-1]
    if weight is not None:
        weight_numbers = NUMBERS.get(weight.dtype, -1)
        if formula == "rounded" and weight.dtype != dtype:
            dtype = torch.float32
        if not weight.is_contiguous():
            weight = weight.contiguous()
    if numbers is None or weight_numbers < 0:
        return reference.rms_norm(x, weight, eps, formula)
    rows = _rows(x)
    if rows is None:
        x = x.contiguous()
        rows = 1, 0, x.numel() // max(size, 1), size
    y = x.new_empty(x.shape, dtype=dtype)
    interface.call(
        "moepress_rms_norm",
        x.data_ptr(),
        numbers,
        *rows,
        size,
        None if weight is None else weight.data_ptr(),
        weight_numbers,
        eps,
        FORMULAS.index(formula),
        torch.get_num_threads(),
        y.data_ptr(),
    )
    return y


def add_into(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """out = a + b, the same bits as torch's. False: these are tensors that it does not take.

    It takes contiguous ones of one shape, dtype and device, with few numbers: for those torch takes
    longer to start than to add.
    """
    numbers, few = NUMBERS.get(a.dtype), a.numel() <= MOST_ADDED
    alike = all(
        x.shape == a.shape and x.dtype == a.dtype and x.is_cpu and x.is_contiguous()
        for x in (a, b, out)
    )
    if numbers is None or not few or not alike:
        return False
    interface.call("moepress_add", a.data_ptr(), b.data_ptr(), a.numel(), numbers, out.data_ptr())
    return True


def _rows(x: Tensor) -> tuple[int, int, int, int] | None:
    """Rows of x in two levels: how many outer ones, their stride, rows in each, their stride.

    None: it has more levels, or the numbers of a row do not follow each other.
    """
    size = x.shape[-1]
    if x.is_contiguous():
        return 1, 0, x.numel() // max(size, 1), size
    *strides, step = x.stride()
    if step != 1 and size != 1:
        return None
    levels: list[tuple[int, int]] = []
    for count, stride in zip(x.shape, strides, strict=False):
        if levels and levels[-1][1] == count * stride:
            levels[-1] = levels[-1][0] * count, stride
        elif count != 1:
            levels.append((count, stride))
    if len(levels) > 2:
        return None
    (outer, outer_stride), (rows, stride) = [(1, 0)] * (2 - len(levels)) + levels
    return outer, outer_stride, rows, stride


def _turn(style: Style) -> int:
    """MoepressTurn, without kWide."""
    return style.neighbours_in + 2 * style.neighbours_out + 4 * style.of_pairs


TURNS = {name: _turn(style) for name, style in STYLES.items()}


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str, wide: bool
) -> tuple[Tensor, Tensor]:
    """The op `moepress::rotary`."""
    numbers, angle_numbers = NUMBERS.get(q.dtype), NUMBERS.get(cos.dtype)
    y = torch.empty_like(q), torch.empty_like(k)
    strides = [x.stride() for x in (q, k, *y)]
    if numbers is None or angle_numbers is None or any(s[3] != 1 for s in strides):
        return reference.rotary(q, k, cos, sin, style, wide)
    q_strides, k_strides, q_out, k_out = (s[:3] for s in strides)
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    angle_batch, angle_token, _ = cos.stride()
    batches, heads, tokens, size = q.shape
    interface.call(
        "moepress_rotary",
        q.data_ptr(),
        *q_strides,
        heads,
        k.data_ptr(),
        *k_strides,
        k.shape[1],
        numbers,
        cos.data_ptr(),
        sin.data_ptr(),
        angle_batch if len(cos) > 1 else 0,
        angle_token,
        angle_numbers,
        batches,
        tokens,
        size,
        STYLES[style].rotated(cos.shape[-1]),
        TURNS[style] + wide * WIDE,
        torch.get_num_threads(),
        y[0].data_ptr(),
        *q_out,
        y[1].data_ptr(),
        *k_out,
    )
    return y


def cache_write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
    """The op `moepress::cache_write`, of numbers of any dtype."""
    batches, heads, room, size = keys.shape
    strides = [x.stride() for x in (keys, key, values, value)]
    if any(s[3] != 1 for s in strides):
        reference.cache_write(keys, values, key, value, position)
        return
    into_keys, of_key, into_values, of_value = strides
    interface.call(
        "moepress_cache_write",
        keys.data_ptr(),
        *into_keys[:3],
        key.data_ptr(),
        *of_key[:2],
        size,
        keys.element_size(),
        values.data_ptr(),
        *into_values[:3],
        value.data_ptr(),
        *of_value[:2],
        values.shape[3],
        values.element_size(),
        batches,
        heads,
        room,
        position.data_ptr(),
    )
