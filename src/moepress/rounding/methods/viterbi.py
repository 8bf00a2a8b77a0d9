"""The best path of a trellis code for given weights: Viterbi's algorithm, in integers.

For targets x_1 .. x_T in units of the code's values, the branches b_t whose values v(state_t) make
sum_t (x_t - v(state_t))^2 least (kernels/trellis.py says how branches make states). A state's
predecessors are the 2**k states that end with its older bits, so with cost_t(s) the least cost of
any path that ends in s,

    cost_t(s) = min over j of cost_(t-1)(j * 2**(12-k) + s // 2**k)  +  (x_t - v(s))^2

Costs are unsigned 16-bit integers, which machines compare sixteen or more at a time: targets and
values are taken in steps of 1 / UNITS[k], a square is (d * d + 2**14) >> 15, sums saturate at
65535, and the least cost is subtracted every 16 steps. Equal costs take the smallest j, so that
every implementation finds the same path.

A path must end in the state that it starts from. Which one: the best path through the last WINDOW
weights and then the first WINDOW, over any states, passes some state between them; that is taken.
A path of more than RUN steps is found in runs: each starts where the one before ended. `search` is
C++ where it is compiled (kernels/cpu/viterbi.cpp) and the weights are on the CPU; `search_plainly`
is its oracle, and runs on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepress.kernels import cpu
from moepress.kernels.trellis import (
    STATE_BITS,
    STATES,
    STEPS,
    code_values,
    from_paths,
    to_paths,
)

UNITS = {1: 40, 2: 64, 3: 80, 4: 80}  # steps of a target for each unit of a value
RUN = 1024  # steps decided together
WINDOW = 64
LARGEST = 65535


def search(target: Tensor, bits: int) -> Tensor:
    """Branches for eight columns of a matrix.

    Args:
        target: [8, 64 S] float32, columns first, in the units of `code_values`.
        bits: of the code, 1 to 4.

    Returns:
        [8, 64 S] uint8.
    """
    if target.device.type == "cpu" and cpu.missing() is None:
        return cpu.trellis_search(target, bits)
    return search_plainly(target, bits)


def search_plainly(target: Tensor, bits: int) -> Tensor:
    """As `search`, in PyTorch operations on all 32 paths at once."""
    steps = (target * UNITS[bits]).round().clamp(-32767, 32767).int()  # half to even
    paths = to_paths(steps.T.contiguous()).permute(1, 2, 3, 0, 4).reshape(32, -1)  # [32, T]
    values = code_values(bits).to(target.device) * UNITS[bits]
    window = min(WINDOW, paths.shape[1])
    seam = torch.cat([paths[:, -window:], paths[:, :window]], dim=1)
    anywhere = torch.zeros(32, STATES, dtype=torch.int32, device=target.device)
    _, passed = _best_path(seam, anywhere, values, bits)
    start = state = passed[:, window - 1]
    runs = []
    for first in range(0, paths.shape[1], RUN):
        part = paths[:, first : first + RUN]
        costs = torch.full_like(anywhere, LARGEST).scatter_(1, state[:, None], 0)
        end = start if first + RUN >= paths.shape[1] else None
        branches, passed = _best_path(part, costs, values, bits, end)
        runs.append(branches)
        state = passed[:, -1]
    found = torch.cat(runs, dim=1).view(1, 16, 2, -1, STEPS).permute(3, 0, 1, 2, 4)
    return from_paths(found).T.contiguous().to(torch.uint8)


def _best_path(
    paths: Tensor, costs: Tensor, values: Tensor, bits: int, end: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Branches and states [n, T] int64 of the best paths through targets [n, T].

    Args:
        costs: [n, 4096] int32, of the states before the first target.
        end: [n] int64, the last states; None: the best.
    """
    older = STATE_BITS - bits
    came_from = []
    for t in range(paths.shape[1]):
        parts = costs.view(-1, 1 << bits, 1 << older)
        best, origin = parts[:, 0], torch.zeros_like(parts[:, 0])
        for j in range(1, 1 << bits):
            less = parts[:, j] < best
            best, origin = torch.where(less, parts[:, j], best), origin.masked_fill(less, j)
        came_from.append(origin)
        d = (paths[:, t, None] - values).clamp(-32768, 32767)
        square = (d * d + (1 << 14)) >> 15
        costs = (best.repeat_interleave(1 << bits, 1) + square).clamp(max=LARGEST)
        if t % STEPS == STEPS - 1:
            costs -= costs.amin(1, keepdim=True)
    state = costs.argmin(1) if end is None else end  # of equal ones the first
    states = [state]
    for origin in reversed(came_from):
        rest = state >> bits
        state = rest | origin.gather(1, rest[:, None]).squeeze(1).long() << older
        states.append(state)
    passed = torch.stack(states[-2::-1], dim=1)
    return passed & ((1 << bits) - 1), passed
