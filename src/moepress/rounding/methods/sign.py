"""Sign: each weight becomes its sign, one bit, times the mean magnitude of its group.

Without calibration, this is the 1-bit grid of least squared error (XNOR-Net, arXiv:1603.05279,
eq. 6).
"""

from __future__ import annotations

from torch import Tensor

from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.rounding.methods.grid import QuantizedMatrix, mean_magnitude
from moepress.rounding.methods.rtn import round_to_nearest


def quantize_sign(weight: Tensor, codec: Codec) -> QuantizedMatrix:
    """Round a weight matrix [N, K] to the signs of its weights.

    Raises:
        InputError: the codec is not 1-bit.
    """
    if codec.bits != 1:
        raise InputError(
            f"Quantizer 'sign' makes 1-bit codes, got {codec.bits} bits. Use gptq or rtn."
        )
    return round_to_nearest(weight, codec, mean_magnitude)
