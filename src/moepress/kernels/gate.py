"""What lies between the two products of an expert."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields
from typing import Any

from moepress.errors import InputError


@dataclass(frozen=True, slots=True)
class Gate:
    """The function h(g, u) that an expert puts between its two products, element by element.

    g and u are the rows of the first product, gate rows first: g = W_g x + b_g, u = W_u x + b_u.

        g <- min(g, limit)              u <- min(max(u, -limit), limit)
        a = act(g)                      u <- cap(u, up_softcap) + up_offset
        h = a * u

    with cap(x, c) = c tanh(x / c), the identity at c = inf. The defaults give h = act(g) * u.
    `reference.gated` computes it, and is the definition of correct.

    Attributes:
        activation: act, a name in `reference.ACTIVATIONS`, which has ACT2FN's names.
        gated: False: there is no u. The first product has one matrix, and h = a (nemotron_h).
        limit: above 0 (deepseek_v4: 10, gpt_oss: 7).
        alpha: "silu" alone: act(g) = g sigmoid(alpha g) (gpt_oss: 1.702).
        up_offset: gpt_oss: 1.
        limits_output: the limit holds for a and not for g: a <- min(act(g), limit) (step3p7).
        gate_softcap: "silu" alone: act(g) = cap(g, gate_softcap) sigmoid(alpha g) (inkling2: 4).
        up_softcap: inkling2: 25.

    Raises:
        InputError: a number is out of range, or does not fit the other fields.
    """

    activation: str
    gated: bool = True
    limit: float = math.inf
    alpha: float = 1.0
    up_offset: float = 0.0
    limits_output: bool = False
    gate_softcap: float = math.inf
    up_softcap: float = math.inf

    def __post_init__(self) -> None:
        for name in ("limit", "gate_softcap", "up_softcap"):
            value = getattr(self, name)
            if not value > 0:  # refuses NaN too
                raise InputError(f"{name} of a gate is {value}. Expected a number above 0, or inf.")
        for name in ("alpha", "up_offset"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise InputError(f"{name} of a gate is {value}. Expected a finite number.")
        if self.activation != "silu" and (self.alpha != 1 or self.gate_softcap != math.inf):
            raise InputError(
                f"A gate with activation '{self.activation}' has alpha {self.alpha} and "
                f"gate_softcap {self.gate_softcap}. Expected 1 and inf: they belong to 'silu'."
            )
        if not self.gated and (self.up_offset != 0 or self.up_softcap != math.inf):
            raise InputError(
                f"Experts without a gate have up_offset {self.up_offset} and up_softcap "
                f"{self.up_softcap}. Expected 0 and inf: there is no second factor."
            )

    @property
    def parts(self) -> int:
        """Matrices of I rows in the first product: 2 (gate and up), or 1 without a gate."""
        return 2 if self.gated else 1

    @property
    def plain(self) -> bool:
        """Whether h is act(g) * u, or act(g) without a gate: no other field has an effect."""
        return not any(self._sets(field) for field in fields(self)[2:])

    def __str__(self) -> str:
        """The activation and the fields that are not at their defaults."""
        given = (f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if self._sets(f))
        return ", ".join([self.activation, *given])

    def _sets(self, field: Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)


def packed_names(gated: bool) -> tuple[str, str]:
    """Names of the packed parameters of experts, with or without a gate, as in transformers."""
    return "gate_up_proj" if gated else "up_proj", "down_proj"
