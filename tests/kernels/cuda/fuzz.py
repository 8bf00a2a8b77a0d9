"""Random calls of the CUDA ops in the emulator, beside their oracles.

    python -m tests.kernels.cuda.fuzz --seconds 300 --seed 1
    python -m tests.kernels.cuda.fuzz --seed 1 --only linear --case 17     # that case again

Ops take turns until the time is over. A case that fails prints one line: the command that repeats
it, what went wrong, and what was drawn. `EMULATED_RACES=1` in the environment also finds races.
Kernels are compiled when first used, in seconds each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from unittest.mock import patch

import torch

from moepress.kernels.cuda import launch
from moepress.kernels.cuda.search import available
from tests.kernels.cuda import emulate
from tests.kernels.cuda.fuzzing import parts, products, rounding, small
from tests.kernels.cuda.fuzzing.draw import Draw

CASES: dict[str, Callable[[Draw], None]] = (
    products.CASES | parts.CASES | small.CASES | rounding.CASES
)
RARE = {"search": 20}  # one case in so many rounds: it takes a second
MULTIPROCESSORS = (1, 2, 8, 132)


def run(op: str, seed: int, case: int) -> str | None:
    """Run one case. None if all is right, else what is wrong, on one line."""
    draw = Draw(op, seed, case)
    launcher = launch.Launcher(emulate.launch, draw.one("multiprocessors", MULTIPROCESSORS))
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    available.cache_clear()
    try:
        with patch.dict(launch.LAUNCHERS, {"cpu": lambda device: launcher}):
            CASES[op](draw)
    except Exception as error:  # whatever a case raises is its result
        what = " ".join(f"{type(error).__name__}: {error}".split())
        drawn = ", ".join(f"{name}={value}" for name, value in draw.parameters.items())
        return f"--only {op} --seed {seed} --case {case}: {what[:300]} | {drawn}"
    finally:
        available.cache_clear()
        torch.use_deterministic_algorithms(deterministic)
    return None


def fuzz(ops: Sequence[str], seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Run cases of ops in turn for a time: how many of each, and what is wrong."""
    ran: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + seconds
    for case in count():
        for op in ops:
            if len(ops) > 1 and case % RARE.get(op, 1):
                continue
            if time.monotonic() >= end and case > 0:  # each once at least
                return ran, wrong
            ran[op] += 1
            line = run(op, seed, case)
            if line is not None:
                wrong.append(line)
                print(line, flush=True)
    raise AssertionError("unreachable")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="an op; repeatable")
    parser.add_argument("--case", type=int, help="run one case, by number")
    given = parser.parse_args()
    ops = given.only or list(CASES)
    torch.set_num_threads(1)
    if given.case is not None:
        found = [line for op in ops if (line := run(op, given.seed, given.case)) is not None]
        print("\n".join(found) or "right")
        return int(bool(found))
    ran, wrong = fuzz(ops, given.seed, given.seconds)
    print(", ".join(f"{op} {n}" for op, n in ran.items()))
    print(f"{ran.total()} cases, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
