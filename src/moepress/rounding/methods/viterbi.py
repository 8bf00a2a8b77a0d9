"""The best path of a trellis code for given weights: Viterbi's algorithm, in integers.

The targets x_1 .. x_T are weights in units of the code's values. The search finds the branches that
minimise sum_t (x_t - v(state_t))^2; kernels/trellis.py defines the value v(state) and how branches
make states. The predecessors of a state s are the 2**k states whose low 12 - k bits equal the high
12 - k bits of s. So the least cost of any path to state s at step t is

    cost_t(s) = min over j of cost_(t-1)(j * 2**(12-k) + s // 2**k)  +  (x_t - v(s))^2

At half widths k and v differ between even and odd steps.

Costs are unsigned 16-bit integers, of which CPUs compare sixteen or more at a time: targets and
values are rounded to steps of 1 / UNITS[bits], a square is (d * d + 2**14) >> 15, sums saturate at
65535, and the least cost is subtracted every 16 steps. Among equal costs the smallest j is taken,
so every implementation finds the same path.

Paths are tail-biting: a path must end in the state that it starts from. To choose that state, first
find the best path, start and end free, through the last SEAM targets followed by the first SEAM.
Take its state where the two meet (docs/log.md#tail-biting). A path of more than RUN steps is found
in runs, each of which starts in the state where the one before ended.

`search` uses the compiled C++ (kernels/cpu/viterbi.cpp) if there is one and the weights are on the
CPU, and the CUDA kernel (kernels/cuda/viterbi.cu) on NVIDIA cards. `search_plainly` is their oracle
and runs on every device. `round_together` searches the same columns of many matrices: a card runs
several hundred paths at a time, and eight columns of a matrix have 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.kernels import cpu
from moepress.kernels.cuda import search as cuda
from moepress.kernels.trellis import (
    STATE_BITS,
    STATES,
    STEPS,
    TILE_COLUMNS,
    branch_bits,
    code_matrix,
    from_paths,
    to_paths,
    values_in_turn,
)

# By code bits: a target of 1 is this many integer steps.
UNITS = {1: 40, 1.5: 52, 2: 64, 2.5: 80, 3: 80, 3.5: 80, 4: 80}
RUN = 1024  # steps of a path that are decided together
SEAM = 64  # targets on each side of the seam, where the end of a path meets its start
LARGEST = 65535  # cost at which sums saturate


def search(target: Tensor, bits: float) -> Tensor:
    """Branches of the best paths through eight columns of a matrix.

    Args:
        target: [8, 64 S] float32, columns first, in the units of `code_values`.
        bits: of the code, one of TRELLIS_BITS.

    Returns:
        [8, 64 S] uint8.
    """
    if cuda.available(target.device):
        return cuda.trellis_search(target, bits)
    if target.device.type == "cpu" and cpu.missing() is None:
        return cpu.trellis_search(target, bits)
    return search_plainly(target, bits)


def round_together(
    target: Tensor, feedback: Tensor, branches: Tensor, bits: Sequence[float], first: int
) -> None:
    """Round columns first .. first + 7 of M matrices to the best paths, in place.

    Args:
        target: [M, K, 64 S] float32, columns first, in the units of `code_values`. Overwritten with
            what is left: the target with feedback, minus the values of the codes.
        feedback: [M, K, 64 S] float32, added to the target. Overwritten with the errors: the target
            without feedback, minus the values of the codes.
        branches: [M, K, 64 S] uint8, overwritten with the codes.
        bits: [M] of the codes.
        first: a multiple of 8.
    """
    columns = slice(first, first + TILE_COLUMNS)
    if cuda.available(target.device):
        received = feedback[:, columns].clone()
        cuda.trellis_search_together(target, feedback, branches, bits, first)
        torch.add(feedback[:, columns], received, out=target[:, columns])
        return
    compiled = target.device.type == "cpu" and cpu.missing() is None
    for number, width in enumerate(bits):
        one = target[number, columns], feedback[number, columns], branches[number, columns]
        (cpu.trellis_round if compiled else round_plainly)(*one, width)


def round_plainly(target: Tensor, feedback: Tensor, branches: Tensor, bits: float) -> None:
    """`round_together` in PyTorch operations, for the eight columns of one matrix."""
    wanted = target + feedback
    branches.copy_(search_plainly(wanted, bits))
    values = code_matrix(branches.T.contiguous(), bits).T
    torch.sub(target, values, out=feedback)
    torch.sub(wanted, values, out=target)


def search_plainly(target: Tensor, bits: float) -> Tensor:
    """`search` in PyTorch operations, on all 32 paths at once."""
    steps = (target * UNITS[bits]).round().clamp(-32767, 32767).int()  # halves round to even
    paths = to_paths(steps.T.contiguous()).permute(1, 2, 3, 0, 4).reshape(32, -1)  # [32, T]
    values = values_in_turn(bits).to(target.device) * UNITS[bits]
    length = min(SEAM, paths.shape[1])
    seam = torch.cat([paths[:, -length:], paths[:, :length]], dim=1)
    anywhere = torch.zeros(32, STATES, dtype=torch.int32, device=target.device)
    _, passed = _best_path(seam, anywhere, values, bits)
    start = state = passed[:, length - 1]
    runs = []
    for first in range(0, paths.shape[1], RUN):
        run = paths[:, first : first + RUN]
        costs = torch.full_like(anywhere, LARGEST).scatter_(1, state[:, None], 0)
        end = start if first + RUN >= paths.shape[1] else None
        branches, passed = _best_path(run, costs, values, bits, end)
        runs.append(branches)
        state = passed[:, -1]
    found = torch.cat(runs, dim=1).view(1, 16, 2, -1, STEPS).permute(3, 0, 1, 2, 4)
    return from_paths(found).T.contiguous().to(torch.uint8)


def _best_path(
    targets: Tensor, costs: Tensor, values: Tensor, bits: float, end: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Branches and states [n, T] int64 of the best path for each of n sequences of T targets.

    Args:
        targets: [n, T] int32, in integer steps.
        costs: [n, 4096] int32, of the states before the first target.
        values: [2, 4096] int32 of the states in even and in odd steps, in integer steps.
        end: [n] int64, the state in which each path must end; None: the best one.
    """
    widths = branch_bits(bits)
    best_predecessors = []  # by step: [n, 2**(12 - k)] the j of the best predecessor
    for t in range(targets.shape[1]):
        width = widths[t % 2]
        by_predecessor = costs.view(-1, 1 << width, STATES >> width)
        best, best_j = by_predecessor[:, 0], torch.zeros_like(by_predecessor[:, 0])
        for j in range(1, 1 << width):
            cost = by_predecessor[:, j]
            less = cost < best
            best, best_j = torch.where(less, cost, best), best_j.masked_fill(less, j)
        best_predecessors.append(best_j)
        d = (targets[:, t, None] - values[t % 2]).clamp(-32768, 32767)
        square = (d * d + (1 << 14)) >> 15
        costs = (best.repeat_interleave(1 << width, 1) + square).clamp(max=LARGEST)
        if t % STEPS == STEPS - 1:
            costs -= costs.amin(1, keepdim=True)
    state = costs.argmin(1) if end is None else end  # of equal costs the first state
    states = [state]
    for t in reversed(range(targets.shape[1])):
        width = widths[t % 2]
        rest = state >> width
        best_j = best_predecessors[t].gather(1, rest[:, None]).squeeze(1)
        state = rest | best_j.long() << STATE_BITS - width
        states.append(state)
    passed = torch.stack(states[-2::-1], dim=1)
    masks = torch.tensor([(1 << width) - 1 for width in widths], device=passed.device)
    steps = torch.arange(passed.shape[1], device=passed.device)
    return passed & masks[steps % 2], passed
