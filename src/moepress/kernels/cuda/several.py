"""The op `moepress::linears`: several matrices times the same inputs, in one launch.

For few tokens and trellis codes; everything else is multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.kernels.cuda.codes import Codes
from moepress.kernels.cuda.launch import DTYPES, Argument, launcher_for
from moepress.kernels.cuda.products import FEW, FEW_ROWS
from moepress.kernels.matrix import PackedMatrix

MOST = 4  # matrices of a launch, kMostMatrices
KERNEL = "moepress_trellis_decode_several"
ABSENT: tuple[Argument, ...] = (None, 0, 0, 0)


def takes(tokens: int, matrices: Sequence[PackedMatrix]) -> bool:
    """Whether the matrices are multiplied in one launch."""
    kinds = {(m.codec.family, m.codec.group_size) for m in matrices}
    alike = len(kinds) == 1 and matrices[0].codec.family == "trellis"
    return alike and 0 < tokens <= FEW_ROWS and len(matrices) <= MOST


def products(x: Tensor, matrices: Sequence[PackedMatrix], planes: int, y: Tensor) -> None:
    """y [T, sum of rows] = x [T, K] times each matrix; see `takes`. x and weights are aligned."""
    tokens, cols = x.shape
    codec = matrices[0].codec
    launcher, kernel = launcher_for(x.device), FEW[codec.family]
    codes = Codes(x, tokens, cols, codec.group_size, planes, codec.family, kernel.halves)
    codes.round(launcher, x)
    panels = -(-tokens // kernel.panel(planes))
    slabs = [kernel.row_blocks(m.rows) for m in matrices]
    blocks, splits = codes.parts(kernel, sum(slabs) * kernel.rows, panels, launcher)
    joined = next(n for n in (1, 2, 4) if -(-sum(slabs) // n) <= blocks)
    rows = sum(m.rows for m in matrices)
    out = x.new_empty((splits, tokens, rows), dtype=torch.float32)
    args: list[Argument] = [
        codes.q, codes.scale, codes.sum, planes, tokens, cols, codec.group_size, out, splits, rows,
        joined,
    ]  # fmt: skip
    for m in matrices:
        args += (m.weight, m.weight.numel(), m.codec.number, m.rows)
    args += ABSENT * (MOST - len(matrices))
    launcher.launch(
        f"{KERNEL}_g{codec.group_size}_p{planes}",
        (sum(-(-s // joined) for s in slabs), splits, panels),
        kernel.threads,
        kernel.shared(cols, codec.group_size, splits, planes),
        args,
    )
    launcher.launch(
        "moepress_combine_linear",
        (-(-rows // 128), tokens, 1),
        128,
        0,
        (out, splits, tokens, rows, None, 0, y, DTYPES[y.dtype]),
    )
