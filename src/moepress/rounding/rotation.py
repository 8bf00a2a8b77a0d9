"""The rotation of the trellis code (kernels/trellis.py), compiled where that is possible.

All implementations give equal floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels import cpu, trellis
from moepress.kernels.cuda import rotation as cuda
from moepress.kernels.cuda.search import available

COLUMNS = 32  # compiled code takes rows of a multiple


def rotate(x: Tensor) -> Tensor:
    """Rotate inputs: Q x, computed in float32 or wider.

    Args:
        x: [..., K]; the result has its shape and dtype.
    """
    if available(x.device) and cuda.takes(x):
        return cuda.rotate(x)
    if _compiled(x) and x.dtype.itemsize <= torch.float32.itemsize:
        return _rotated(x, back=False)
    return trellis.rotate(x)


def rotate_back(weight: Tensor) -> Tensor:
    """W from W Q^T, both [..., K]."""
    if available(weight.device) and cuda.takes(weight):
        return cuda.rotate(weight, back=True)
    if _compiled(weight) and weight.dtype == torch.float32:
        return _rotated(weight, back=True)
    return trellis.rotate_back(weight)


def _compiled(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and cpu.missing() is None
    return on_cpu and x.numel() > 0 and x.shape[-1] % COLUMNS == 0


def _rotated(x: Tensor, back: bool) -> Tensor:
    rows = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    cpu.trellis_rotate(rows.view(-1, x.shape[-1]), back)
    return rows.to(x.dtype)
