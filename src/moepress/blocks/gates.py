"""Which `Gate` of the kernels computes the same as an experts module, recognised by values.

The module's own function is evaluated at numbers that show every option of `Gate`, and compared
with the gates that its attributes allow: limits and softcaps are looked up among the numbers that
the module and its activation hold. So a new family with known options needs no change here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moepress.blocks.form import apply_gate
from moepress.kernels.gate import Gate
from moepress.kernels.reference import ACTIVATIONS, gated

NEAR = 8.0  # the probe's values lie between -NEAR and NEAR, and a thousand times farther
NUMBERS = ("limit", "alpha", "cap")  # parts of the names of attributes that may be integers


def gate_of(module: Any) -> Gate | None:
    """The gate of an experts module; None: no `Gate` computes the same."""
    activation = getattr(module, "act_fn", None)
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None  # learned, so its values are not known yet
    is_gated = bool(getattr(module, "has_gate", True))
    first = _probe(is_gated)
    few = slice(None, None, 151)  # most candidates differ there already
    with torch.inference_mode():
        wanted = apply_gate(module, first)
        for gate in _candidates(is_gated, tuple(sorted(set(_numbers(module))))):
            if all(_equal(wanted[some], gated(gate, first[some])) for some in (few, slice(None))):
                return gate
    return None


def _equal(wanted: Tensor, found: Tensor) -> bool:
    return torch.allclose(wanted, found, rtol=1e-5, atol=1e-6)


@lru_cache(maxsize=2)
def _probe(is_gated: bool) -> Tensor:
    """Outputs [P, R] of gate and up: all pairs of some numbers. Only large ones reveal limits."""
    near = torch.linspace(-NEAR, NEAR, 33, dtype=torch.float32, device="cpu")
    values = torch.cat([near, 0.3 + 3 * near, 1000 * near])
    return torch.cartesian_prod(values, values) if is_gated else values[:, None]


def _numbers(module: Any) -> Iterator[float]:
    """Numbers above 0 that a module and its submodules hold as attributes."""
    for part in module.modules():
        for name, value in vars(part).items():
            known = isinstance(value, int) and any(word in name for word in NUMBERS)
            if (isinstance(value, float) or known) and 0 < value < math.inf:
                yield float(value)


@lru_cache(maxsize=16)
def _candidates(is_gated: bool, numbers: tuple[float, ...]) -> tuple[Gate, ...]:
    """All gates with options of these values, those with fewer options first."""
    off = math.inf
    caps, alphas = (off, *numbers), (1.0, *(n for n in numbers if n != 1))
    offsets = (0.0, 1.0) if is_gated else (0.0,)
    found = [
        Gate(name, is_gated, limit, 1.0, offset, limits_output, off, up_softcap)
        for name in ACTIVATIONS
        for limit, offset, limits_output, up_softcap in product(
            caps, offsets, (False, True), caps if is_gated else (off,)
        )
    ]
    found += [
        Gate("silu", is_gated, limit, alpha, offset, False, gate_softcap, up_softcap)
        for limit, alpha, offset, gate_softcap, up_softcap in product(
            caps, alphas, offsets, caps, caps if is_gated else (off,)
        )
        if alpha != 1 or gate_softcap != off
    ]
    return tuple(sorted(found, key=_options))


def _options(gate: Gate) -> int:
    """How many fields of a gate are not at their defaults."""
    usual = Gate(gate.activation, gate.gated)
    fields = Gate.__dataclass_fields__
    named = 2 * (gate.activation == "quick_gelu")  # silu of an alpha: the name that configs use
    return named + sum(bool(getattr(gate, name) != getattr(usual, name)) for name in fields)
