"""Quantizers: methods that round a weight matrix to codes. One file per method.

| name | rounds to | needs a Hessian | file |
|---|---|---|---|
| `gptq` | the nearest code after error feedback, searched grid | yes | gptq.py |
| `gptq-released` | the same in the variant that MC published, for comparison | yes | gptq.py |
| `rtn` | the nearest code, searched grid | no | rtn.py |
| `sign` | the sign, 1 bit only | no | sign.py |

A quantizer takes a weight matrix [N, K] and a codec, and returns a `QuantizedMatrix`; equal input
gives equal bytes. For a codec of the trellis family, trellis.py rounds instead, with error feedback
under the name `gptq`, without it under `rtn`, and returns a `TrellisMatrix`. Scoring with `measure`
"noise" rounds nothing: it draws the errors that `gptq` would leave in trellis codes (../noise.py).
To add a quantizer, write its file and add it to a table below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.rounding.factor import Factor
from moepress.rounding.methods.gptq import quantize_gptq, quantize_gptq_released
from moepress.rounding.methods.grid import QuantizedMatrix
from moepress.rounding.methods.rtn import quantize_rtn
from moepress.rounding.methods.sign import quantize_sign
from moepress.rounding.methods.trellis import TrellisMatrix, Unrounded, quantize_together

__all__ = [
    "QUANTIZERS",
    "Matrix",
    "QuantizedMatrix",
    "Quantizer",
    "TrellisMatrix",
    "Unrounded",
    "needs_hessian",
    "quantize_matrices",
    "quantize_matrix",
]

Matrix = QuantizedMatrix | TrellisMatrix
Quantizer = (
    Callable[[Tensor, Codec], QuantizedMatrix] | Callable[[Tensor, Codec, Factor], QuantizedMatrix]
)
WITHOUT_HESSIAN: Mapping[str, Callable[[Tensor, Codec], QuantizedMatrix]] = {
    "rtn": quantize_rtn,
    "sign": quantize_sign,
}
WITH_HESSIAN: Mapping[str, Callable[[Tensor, Codec, Factor], QuantizedMatrix]] = {
    "gptq": quantize_gptq,
    "gptq-released": quantize_gptq_released,
}
QUANTIZERS: Mapping[str, Quantizer] = {**WITH_HESSIAN, **WITHOUT_HESSIAN}


def needs_hessian(name: str) -> bool:
    """Whether the quantizer `name` needs the factor of a Hessian, and so calibration text.

    Raises:
        InputError: no quantizer has this name.
    """
    _check_name(name)
    return name in WITH_HESSIAN


def quantize_matrix(
    name: str, weight: Tensor, codec: Codec, factor: Factor | None = None
) -> Matrix:
    """Round a weight matrix to codes.

    Args:
        name: one of `QUANTIZERS`.
        weight: [N, K], any float dtype; not changed.
        codec: its group size must divide K.
        factor: of the Hessian of the matrix's inputs, on the weight's device; for a trellis codec,
            of its rotated inputs. Quantizers that need no factor ignore it.

    Raises:
        InputError: no quantizer has this name, it does not take this shape or width, or it needs a
            factor and got none.
        NumericalError: the weight holds NaN or infinity, or a scale overflows.
    """
    (matrix,) = quantize_matrices(name, [Unrounded(weight, codec, factor)])
    return matrix


def quantize_matrices(name: str, matrices: Sequence[Unrounded]) -> list[Matrix]:
    """`quantize_matrix` for several matrices of one shape.

    Trellis codes are searched for all of them at a time, which takes less time on a card.
    """
    _check_name(name)
    for one in matrices:
        _check(name, one)
    with_factor = name in WITH_HESSIAN
    on_paths = [
        one if with_factor else one._replace(factor=None)
        for one in matrices
        if one.codec.family == "trellis"
    ]
    searched = iter(quantize_together(on_paths) if on_paths else [])
    return [
        next(searched) if one.codec.family == "trellis" else _quantize_scalar(name, *one[:3])
        for one in matrices
    ]


def _quantize_scalar(
    name: str, weight: Tensor, codec: Codec, factor: Factor | None
) -> QuantizedMatrix:
    if name in WITHOUT_HESSIAN:
        return WITHOUT_HESSIAN[name](weight, codec)
    assert factor is not None  # checked before
    return WITH_HESSIAN[name](weight, codec, factor)


def _check(name: str, matrix: Unrounded) -> None:
    weight, codec, factor = matrix[:3]
    if codec.family == "trellis" and name not in ("gptq", "rtn"):
        raise InputError(f"Quantizer '{name}' makes scalar codes only. Use gptq or rtn.")
    if name in WITHOUT_HESSIAN:
        return
    if factor is None:
        raise InputError(
            f"Quantizer '{name}' needs the factor of a Hessian, got none. Calibrate, or use rtn."
        )
    if weight.shape[1:] != factor.curvature.shape:
        raise InputError(
            f"The Hessian is of {len(factor.curvature)} inputs, but the weight has shape "
            f"{list(weight.shape)}. Give the Hessian of this matrix's own inputs."
        )


def _check_name(name: str) -> None:
    if name not in QUANTIZERS:
        raise InputError(f"No quantizer '{name}'. Expected one of {list(QUANTIZERS)}.")
