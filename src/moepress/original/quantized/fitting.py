"""Whether what lies beside codes makes weights of them: kinds and shapes, from the headers alone.

A tensor that is missing, or of another kind, would not fail when it is read: it would give other
weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from moepress.errors import FileError
from moepress.original.quantized.forms import Quantized
from moepress.original.quantized.headers import FLOAT8, WIDE, Entry
from moepress.original.quantized.numbers import FP4

INTEGERS = ("I8", "I32")
SCALES = (*WIDE, *FLOAT8, "F8_E8M0", "U8")  # bytes are exponents of two
ZEROS = (*WIDE, "I8")  # of zero points that are not packed


def check_beside(form: Quantized, asymmetric: Collection[int], again: str) -> None:
    """Check the tensors beside some codes.

    Args:
        asymmetric: bits of the integers that have zero points, as config.json says.
        again: end of a message: what to do.

    Raises:
        FileError: a tensor is missing, or of a kind or shape that does not fit.
    """

    def refuse(entry: Entry, expected: str) -> None:
        raise FileError(
            f"{entry.text} does not fit {form.codes.text}. Expected {expected}. {again}"
        )

    if form.scale.dtype not in SCALES:
        refuse(form.scale, "scales that are floats, or bytes that are exponents of two")
    if form.zero is not None:
        kinds, shape = _zeros(form)
        one = math.prod(form.zero.shape) == math.prod(form.scale.shape) == 1
        if form.zero.dtype not in kinds or not (form.zero.shape == shape or one):
            refuse(form.zero, f"zero points {list(shape)}, {' or '.join(kinds)}")
    elif form.codes.dtype in INTEGERS and form.numbers != FP4 and form.numbers.bits in asymmetric:
        raise FileError(
            f"{form.codes.text} has no zero points beside it, but config.json says that they are "
            f'stored ("symmetric": false). {again}'
        )
    for entry in (form.divisor, *(form.factor or ())):
        if entry is not None:
            counts = {1, math.prod(form.leading)} if form.factor else {1}
            if entry.dtype not in WIDE or math.prod(entry.shape) not in counts:
                refuse(entry, "one float for a matrix")


def _zeros(form: Quantized) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The dtypes that zero points may have, and their shape."""
    if not form.zero_numbers.values:
        return ZEROS, form.scale.shape
    length, width = form.matrix
    words = -(-length * form.zero_numbers.bits // 32)  # eight rows of int4 share a word
    return ("I32",), (*form.leading, words, form.columns.count(width))
