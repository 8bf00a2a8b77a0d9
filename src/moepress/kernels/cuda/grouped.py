"""Products with very many tokens: weights decoded to bfloat16, then torch's own products.

Beyond some tokens the decoding of a weight costs little beside its products, and torch's bfloat16
products are the fastest way. Weights are decoded some rows at a time (dequantize.cu) into scratch
memory of about `SCRATCH_BYTES`, for experts that have tokens. Inputs are rotated in float32 where
the weights are trellis codes, and rounded to bfloat16. That is coarser than codes of 15 bits and
finer than codes of 8 bits, so this way is taken for 8 activation bits alone. Sums are in float32;
the results of both products of experts are rounded to bfloat16.

Nothing waits for the card: the ends of the experts' groups stay on it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.format.codec import Codec
from moepress.kernels import trellis
from moepress.kernels.cuda import products
from moepress.kernels.cuda.gates import bias_arguments, gate_arguments, plain_activation
from moepress.kernels.cuda.launch import DTYPES, Launcher, launcher_for
from moepress.kernels.experts_call import ExpertsCall

SCRATCH_BYTES = 512 << 20  # for decoded weights, if it suffices for GRAIN rows
MOST_SCRATCH_BYTES = 1 << 30  # where it does not
GRAIN = 128  # rows of a chunk: a multiple of this number, unless it is the last one
GENERATIONS = (9, 10)  # major compute capabilities for which torch has grouped products of its own
MOST_GROUPS = 1023  # of torch's grouped product
UNIT = 128  # columns that a warp of rounding.cuh takes if they are not rotated
WARPS = 8  # of a block of rounding.cuh
COLUMNS = 512  # of a block of dequantize.cu


def takes_linear(x: Tensor, activation_bits: int) -> bool:
    """Whether x [T, K] is multiplied this way."""
    return activation_bits == 8 and len(x) >= products.GROUPED_ROWS and _new_enough(x.device)


def takes_experts(call: ExpertsCall) -> bool:
    """Whether the experts of a call are computed this way."""
    positions, experts = call.top_k_index.numel(), len(call.gate_up_table)
    return (
        call.activation_bits == 8
        and positions >= products.GROUPED_PER_EXPERT * experts
        and experts <= MOST_GROUPS
        and 2 * experts * 2 * _grain(call) * call.hidden.shape[1] <= MOST_SCRATCH_BYTES
        and 2 * experts * GRAIN * call.intermediate_size <= MOST_SCRATCH_BYTES
        and _new_enough(call.hidden.device)
    )


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, codec: Codec, y: Tensor) -> None:
    """y [T, N] = x [T, K] W^T + bias."""
    (tokens, cols), rows = x.shape, y.shape[1]
    launcher = launcher_for(x.device)
    inputs = x.new_empty((tokens, cols), dtype=torch.bfloat16)
    _round_inputs(launcher, x, codec.family, None, 1, inputs)
    step = _chunk(rows, 2 * cols, GRAIN)
    matrices = _Matrices(
        packed, None, codec.number, codec.family, codec.group_size, None, rows, cols
    )
    scratch = x.new_empty((1, min(step, rows), cols), dtype=torch.bfloat16)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        weight = matrices.rows_from(launcher, scratch, first, None, count)[0]
        y[:, first : first + count] = F.linear(inputs, weight)
    if bias is not None:
        y += bias.to(y.dtype)


def experts(call: ExpertsCall, y: Tensor) -> None:
    """y [T, H] = the routed experts of hidden [T, H]; T and k are not 0."""
    hidden, inner, weights = call.hidden, call.intermediate_size, call.top_k_weights
    (tokens, k), count, width = call.top_k_index.shape, len(call.gate_up_table), hidden.shape[1]
    positions, family, bfloat16 = tokens * k, call.family, torch.bfloat16
    launcher = launcher_for(hidden.device)

    # One panel for each expert that is chosen; those beyond have no positions.
    panels = min(count, positions)
    ints = hidden.new_empty(2 * positions + 3 * panels + 1, dtype=torch.int32)
    pair, position, panel, used = ints.split_with_sizes((positions, positions, 3 * panels, 1))
    tables = call.gate_up_table, call.down_table
    warps = 8 if positions <= 2048 else 32
    routing = call.top_k_index, positions, *tables, count, positions, panels
    launcher.launch(
        "moepress_grouped_route",
        (1, 1, 1),
        32 * warps,
        4 * count * (warps + 1),
        (*routing, pair, position, panel, used),
    )
    ends = panel.view(panels, 3)[:, 2].cumsum(0, dtype=torch.int32)

    inputs = hidden.new_empty((positions, width), dtype=bfloat16)
    _round_inputs(launcher, hidden, family, position, k, inputs)
    between = hidden.new_empty((positions, inner), dtype=bfloat16)
    parts = call.gate.parts  # gate and up, or one matrix
    step = _chunk(inner, 2 * parts * panels * width, _grain(call))
    down_step = _chunk(width, 2 * panels * inner, GRAIN)
    numbers = panels * max(parts * min(step, inner) * width, min(down_step, width) * inner)
    scratch = hidden.new_empty(numbers, dtype=bfloat16)

    # Rows of gate and the same rows of up together.
    group = call.gate_up_group
    matrices = _Matrices(call.gate_up, tables[0], 0, family, group, panel, call.rows, width)
    run, activation = _run(inner, family), plain_activation(call)
    for first in range(0, inner, step):
        rows = min(step, inner - first)
        second = inner + first if call.gated else None
        weight = matrices.rows_from(launcher, scratch, first, second, rows)
        out = F.grouped_mm(inputs, weight.transpose(1, 2), offs=ends)
        given, to = (out, positions, used, first, rows), (run, between, inner)
        grid = grid_of(positions, rows, run)
        if activation is None:
            options = gate_arguments(call, pair)
            launcher.launch("moepress_grouped_any", grid, 32 * WARPS, 0, (*given, *to, *options))
        else:
            launcher.launch("moepress_grouped_gate", grid, 32 * WARPS, 0, (*given, activation, *to))

    group = call.down_group
    matrices = _Matrices(call.down, tables[1], 0, family, group, panel, width, inner)
    for first in range(0, width, down_step):
        rows = min(down_step, width - first)
        weight = matrices.rows_from(launcher, scratch, first, None, rows)
        out = F.grouped_mm(between, weight.transpose(1, 2), offs=ends)
        weighted = out, position, weights, DTYPES[weights.dtype], k, rows
        args: tuple[Tensor | int | None, ...] = *weighted, y, DTYPES[y.dtype], width, first
        name = "moepress_grouped_combine"
        if call.down_bias is not None:
            options = *bias_arguments(call.down_bias), call.top_k_index
            name, args = f"{name}_biased", (*args, *options)
        launcher.launch(name, (-(-rows // 512), tokens, 1), 128, 0, args)


class _Matrices:
    """Packed matrices [rows, cols]: of each panel's expert, or one matrix of a width."""

    def __init__(
        self,
        packed: Tensor,
        table: Tensor | None,
        bits: int,
        family: str,
        group: int,
        panel: Tensor | None,
        rows: int,
        cols: int,
    ) -> None:
        self.packed, self.table, self.bits, self.panel = packed, table, bits, panel
        self.group, self.rows, self.cols = group, rows, cols
        self.panels = 1 if panel is None else panel.numel() // 3
        trellis_codes = family == "trellis"
        self.kernel = f"moepress_dequantize_{'trellis' if trellis_codes else 'scalar'}"
        self.block = 64 if trellis_codes else 16  # rows

    def rows_from(
        self, launcher: Launcher, scratch: Tensor, first: int, second: int | None, count: int
    ) -> Tensor:
        """[panels, count, cols] bfloat16: rows from `first` on; and `count` more from `second` on.

        A view of `scratch`. Matrices of panels without positions are not written.
        """
        starts = [first] if second is None else [first, second]
        blocks = [-(-(s + count) // self.block) - s // self.block for s in starts]
        shape = self.panels, len(starts) * count, self.cols
        out = scratch.view(-1)[: shape[0] * shape[1] * shape[2]].view(shape)
        launcher.launch(
            self.kernel,
            (-(-self.cols // COLUMNS), sum(blocks), self.panels),
            128,
            0,
            (
                self.packed,
                self.packed.numel(),
                self.table,
                self.bits,
                self.panel,
                self.rows,
                self.cols,
                self.group,
                first,
                starts[-1],
                count,
                blocks[0],
                out,
            ),
        )
        return out


def grid_of(rows: int, cols: int, run: int) -> tuple[int, int, int]:
    """The grid of blocks of WARPS warps that round rows: a warp takes a unit of columns."""
    units = rows * (cols // (run or min(UNIT, cols & -cols)))
    return -(-units // WARPS), 1, 1


def _round_inputs(
    launcher: Launcher, x: Tensor, family: str, position: Tensor | None, k: int, out: Tensor
) -> None:
    """Rows of x to their positions in `out`, in bfloat16; rotated for trellis codes."""
    rows, cols = x.shape
    run = _run(cols, family)
    args = x, DTYPES[x.dtype], rows, cols, run, position, k, out
    launcher.launch("moepress_grouped_inputs", grid_of(rows, cols, run), 32 * WARPS, 0, args)


def _run(cols: int, family: str) -> int:
    """The columns that a rotation mixes; 0: none."""
    return trellis.run_length(cols) if family == "trellis" else 0


def _grain(call: ExpertsCall) -> int:
    """The least rows of a chunk of gate: whole runs of the rotation between the products."""
    return max(GRAIN, _run(call.intermediate_size, call.family))


def _chunk(rows: int, row_bytes: int, grain: int) -> int:
    """How many rows are decoded at a time: a multiple of `grain`."""
    most = max(1, SCRATCH_BYTES // (row_bytes * grain))  # in grains
    grains = -(-rows // grain)
    chunks = -(-grains // most)
    return -(-grains // chunks) * grain


def _new_enough(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in GENERATIONS
