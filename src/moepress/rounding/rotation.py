"""The rotation of the trellis code (kernels/trellis.py): one kernel on cards, equal everywhere."""

from __future__ import annotations

from torch import Tensor

from moepress.kernels import trellis
from moepress.kernels.cuda import rotation as cuda
from moepress.kernels.cuda.search import available


def rotate(x: Tensor) -> Tensor:
    """Rotate inputs: Q x, computed in float32 or wider.

    Args:
        x: [..., K]; the result has its shape and dtype.
    """
    return cuda.rotate(x) if available(x.device) and cuda.takes(x) else trellis.rotate(x)


def rotate_back(weight: Tensor) -> Tensor:
    """W from W Q^T, both [..., K]."""
    if available(weight.device) and cuda.takes(weight):
        return cuda.rotate(weight, back=True)
    return trellis.rotate_back(weight)
