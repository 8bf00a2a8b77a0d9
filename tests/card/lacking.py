"""Ops that torch has on CPUs for dtypes for which it has no CUDA kernels.

On a card they raise ('"addmm_cuda" not implemented for 'Long'', say), on a CPU they do not. torch
knows them: its tests of all ops list the dtypes of each op on CPUs and with CUDA.
`python -m tests.card.lacking` prints the difference, and test_pretended.py compares the table with
it.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import torch

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
HALVES = frozenset({torch.float16, torch.bfloat16})
REALS = frozenset({torch.float32, torch.float64})
DTYPES = INTEGERS | HALVES | REALS | {torch.bool}  # that are compared
LONG, BYTE, BOOL = (frozenset({d}) for d in (torch.int64, torch.uint8, torch.bool))

PRODUCTS = (
    "__rmatmul__", "addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "dot", "einsum",
    "inner", "linalg_multi_dot", "linear", "matmul", "mm", "mv", "tensordot", "vdot",
)  # fmt: skip
WINDOWS = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "convolution", "nn.functional.local_response_norm",
)  # fmt: skip
# By the names of ATen, without the underscore of those that write to their argument.
LACKING: dict[str, frozenset[torch.dtype]] = {
    **dict.fromkeys(PRODUCTS, INTEGERS),
    **dict.fromkeys(WINDOWS, LONG),
    **dict.fromkeys(("max_pool2d", "max_pool3d"), INTEGERS),
    **dict.fromkeys(("angle", "histc", "igamma", "igammac"), HALVES),
    **dict.fromkeys(("histogram", "histogramdd"), REALS),
    **dict.fromkeys(
        ("_upsample_bilinear2d_aa", "interpolate", "nn.functional.upsample_bilinear"), BYTE
    ),
    "native_dropout_backward": INTEGERS | BOOL,
    "scatter_reduce": BOOL,  # prod, amin and amax
}


def lacks(name: str, dtype: torch.dtype) -> bool:
    """Whether CUDA has no kernel of an ATen op for the dtype of its first tensor."""
    return dtype in LACKING.get(name.removesuffix("_"), ())


def of_torch() -> dict[str, list[str]]:
    """The table by torch's tests, as on a card of compute capability 9.0.

    Changes `torch.cuda`: for a process of its own.
    """
    names: Any = torch.cuda
    names.is_available = lambda: True
    names.current_device, names.device_count = lambda: 0, lambda: 1
    names.get_device_capability = lambda device=None: (9, 0)
    names.get_device_name = lambda device=None: "NVIDIA H200"
    names.get_device_properties = lambda device=None: _Properties
    torch.version.cuda = "13.0"
    unused: Any = ModuleType("expecttest")  # torch's tests import it; it need not be installed
    unused.TestCase = object
    sys.modules.setdefault("expecttest", unused)
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, set[torch.dtype]] = {}
    for op in op_db:
        lacking = set(op.dtypes) - set(op.dtypesIfCUDA)
        found.setdefault(op.aten_name, set()).update(lacking & DTYPES)
    return {name: sorted(str(d) for d in dtypes) for name, dtypes in found.items() if dtypes}


class _Properties:
    name, major, minor, multi_processor_count, total_memory = "NVIDIA H200", 9, 0, 132, 1 << 37


if __name__ == "__main__":
    print(json.dumps(of_torch()))
