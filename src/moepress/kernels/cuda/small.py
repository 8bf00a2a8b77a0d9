"""The small ops of decoding, one kernel each: rms_norm.cu, rotary.cu, cache_write.cu.

For few tokens a kernel takes about as long as its launch. What it does not take goes to the
reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels import small_reference as reference
from moepress.kernels.cuda.launch import DTYPES, Argument, launcher_for, strided
from moepress.kernels.small_reference import FORMULAS, STYLES

KERNELS = ("moepress_rms_norm", "moepress_rotary", "moepress_cache_write")
NORM_THREADS = 512  # of a block, at most; each has 16 numbers of a row in registers
ROTARY_THREADS = 256
MOST_BLOCKS = 1 << 16  # grids have at most 65535 blocks in some directions
WRITE_THREADS = 512
MOST_UNITS = 1 << 14  # that one block writes
UNITS = (16, 8, 4, 2, 1)  # bytes


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> Tensor:
    """The op `moepress::rms_norm`."""
    if x.dtype not in DTYPES or (weight is not None and weight.dtype not in DTYPES):
        return reference.rms_norm(x, weight, eps, formula)
    size, dtype = x.shape[-1], x.dtype
    if weight is not None:
        weight = weight.contiguous()
        if formula == "rounded":
            dtype = torch.promote_types(dtype, weight.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    if not y.numel():
        return y
    rows = x.reshape(-1, size)
    if rows.stride(1) != 1 and size > 1:
        rows = rows.contiguous()
    stride = rows.stride(0) if len(rows) > 1 else size
    by_eights = (
        size % 8 == stride % 8 == rows.data_ptr() % 16 == 0
        and (weight is None or weight.data_ptr() % 16 == 0)
    )  # fmt: skip
    pieces = -(-size // (8 if by_eights else 1))
    launcher_for(x.device).launch(
        "moepress_rms_norm",
        (len(rows), 1, 1),
        min(NORM_THREADS, -(-pieces // 32) * 32),
        0,
        (
            rows,
            DTYPES[x.dtype],
            stride,
            weight,
            0 if weight is None else DTYPES[weight.dtype],
            size,
            float(eps),
            FORMULAS.index(formula),
            int(by_eights),
            y,
            DTYPES[dtype],
        ),
    )
    return y


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str, wide: bool
) -> tuple[Tensor, Tensor]:
    """The op `moepress::rotary`."""
    batches, heads, tokens, size = q.shape
    if q.dtype not in DTYPES or cos.dtype not in DTYPES or max(batches, tokens) >= MOST_BLOCKS:
        return reference.rotary(q, k, cos, sin, style, wide)
    y = torch.empty_like(q), torch.empty_like(k)
    # A result whose numbers do not follow each other is written to a contiguous one first.
    out = tuple(x if x.stride(3) == 1 else x.new_empty(x.shape) for x in y)
    if q.numel() or k.numel():
        way = STYLES[style]
        rotated = way.rotated(cos.shape[-1])
        if cos.stride() != sin.stride() or cos.stride(2) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        launcher_for(q.device).launch(
            "moepress_rotary",
            (heads + k.shape[1], tokens, batches),
            min(ROTARY_THREADS, -(-(size - rotated // 2) // 32) * 32),
            0,
            (
                *strided(_dense(q)),
                heads,
                *strided(_dense(k)),
                DTYPES[q.dtype],
                cos,
                sin,
                0 if len(cos) == 1 else cos.stride(0),
                cos.stride(1),
                DTYPES[cos.dtype],
                size,
                rotated,
                int(way.neighbours_in),
                int(way.neighbours_out),
                int(way.of_pairs),
                int(wide),
                *strided(out[0]),
                *strided(out[1]),
            ),
        )
    for found, written in zip(y, out, strict=True):
        if found is not written:
            found.copy_(written)
    return y


def cache_write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
    """The op `moepress::cache_write`."""
    batches, heads, room, _ = keys.shape
    if keys.stride(3) != 1 or values.stride(3) != 1:
        reference.cache_write(keys, values, key, value, position)
        return
    key, value = _dense(key), _dense(value)
    held, ones = (keys, values), (key, value)
    unit = next(n for n in UNITS if all(_divides(n, x) for x in (*held, *ones)))
    widths = [x.shape[3] * x.element_size() // unit for x in held]
    units = batches * heads * sum(widths)
    if units > MOST_UNITS:
        reference.cache_write(keys, values, key, value, position)
        return

    def strides(x: Tensor, count: int) -> tuple[int, ...]:
        return tuple(s * x.element_size() // unit for s in x.stride()[:count])

    arguments: list[Argument] = []
    for into, one, width in zip(held, ones, widths, strict=True):
        arguments += [into, *strides(into, 3), one, *strides(one, 2), width]
    launcher_for(keys.device).launch(
        "moepress_cache_write",
        (1, 1, 1),
        min(WRITE_THREADS, max(32, -(-units // 32) * 32)),
        0,
        (*arguments, batches * heads, heads, unit, room, position),
    )


def _dense(x: Tensor) -> Tensor:
    """x, or a copy whose numbers of a head follow each other."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _divides(unit: int, x: Tensor) -> bool:
    """Whether rows of x are whole units, at addresses that are multiples of it."""
    size = x.element_size()
    rows = (s for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1)
    sizes = (x.shape[3], *rows)
    return x.data_ptr() % unit == 0 and all(n * size % unit == 0 for n in sizes)
