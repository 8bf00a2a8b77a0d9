"""What products of many tokens take of memory, beside their arguments and results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moepress.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.missing() is not None or sys.platform != "linux", reason="needs the library, and Linux"
)

LINEAR = """
tokens, rows, codec = 80_000, 512, Codec(2, 32)
packed = random_packed(rows, 32, codec)
x = torch.zeros(tokens, 32, dtype=torch.bfloat16)

def product(count):
    return cpu.linear(x[:count], packed, None, rows, codec, 8)
"""
EXPERTS = """
tokens = 200_000
case = make_case(tokens=tokens, k=4)

def product(count):
    some = {name: getattr(case, name)[:count] for name in ("hidden", "index", "weights")}
    return cpu.experts(dataclasses.replace(case, **some).call(8))
"""
EXPERTS_IN_BFLOAT16 = """
case = make_case(tokens=400_000, k=1)
tokens, hidden = 400_000, case.hidden.bfloat16()

def product(count):
    some = dataclasses.replace(case, index=case.index[:count], weights=case.weights[:count])
    return cpu.experts(dataclasses.replace(some.call(8), hidden=hidden[:count]))
"""
MEASURE = """
import dataclasses, resource, torch
from moepress.format.codec import Codec
from moepress.kernels import cpu
from tests.kernels.test_kernels import make_case, random_packed

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

{setup}
product(100)  # starts threads
before = peak()
y = product(tokens)
print(peak() - before - y.nbytes)
"""


@pytest.mark.parametrize(
    "setup", [LINEAR, EXPERTS, EXPERTS_IN_BFLOAT16], ids=["linear", "experts", "bfloat16"]
)
def test_memory_does_not_grow_with_the_tokens(setup: str) -> None:
    """All tokens at once would take 150 MB: floats in place of bfloat16, or codes of the inputs."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(setup=setup)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50e6
