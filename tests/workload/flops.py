"""Count the floating-point operations of the matrix products that PyTorch runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
SMALL = 8  # triangular systems of a column block are counted as elements, not as operations


class FlopCount(TorchDispatchMode):
    """Inside the `with` statement, `flops` counts products and large triangular solves.

    Attention is left out, as `workload` counts it by pairs of tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            self.flops += flop_registry[packet](*args, out_val=out)
        elif packet == aten.addmm_:
            self.flops += 2 * args[1].numel() * args[2].shape[1]
        elif packet == aten.linear:
            self.flops += 2 * args[0].numel() * len(args[1])
        elif packet == aten.matmul:
            self.flops += 2 * args[0].numel() * (args[1].shape[-1] if args[1].dim() > 1 else 1)
        elif packet == aten.linalg_solve_triangular and len(args[0]) > SMALL:
            self.flops += args[1].numel() * len(args[0])
        return out
