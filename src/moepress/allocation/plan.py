"""The plan: the width of every expert and every open tensor, and the bytes that result."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from moepress.errors import CheckpointError, FileError, InputError
from moepress.format.checkpoint import save_json
from moepress.format.codec import (
    GROUP_SIZES,
    LEFT_OUT,
    read_widths,
    spell_widths,
    width,
    width_number,
)
from moepress.reading.documents import Array, Document, parse
from moepress.reading.json import read_json
from moepress.recipe import BEFORE, FAST, TABLE_BITS, Recipe
from moepress.writing.ours import expecting

PROJECTIONS = ("gate_up", "down")
KIND = "plan"
AGAIN = "Make it again with `moepress allocate`."

Bytes = Annotated[int, Field(gt=0, lt=1 << 63)]


class LayerFields(Document):
    """The widths of a layer's experts in the file."""

    layer: Annotated[int, Field(ge=0, lt=1 << 16)]
    gate_up: str
    down: str


class PlanFields(Document):
    """The fields of the file, without its kind."""

    layers: Array[LayerFields]
    linear_bits: dict[str, float] = Field(default_factory=dict)
    group_size: int
    predicted_loss: float
    expert_bytes: Bytes
    total_bytes: Bytes
    folder_bytes: Bytes
    average_bits: float
    expert_bits_per_weight: float
    bits_per_weight: float
    recipe: dict[str, Any]
    provenance: dict[str, str]
    scaled_layers: Array[Annotated[int, Field(ge=0, lt=1 << 16)]] = ()


@dataclass(frozen=True)
class BitAllocation:
    """The plan: code bits of both projections of every routed expert. L MoE layers, E experts."""

    layers: tuple[int, ...]  # [L] index of each MoE layer in the model
    bits: npt.NDArray[np.float64]  # [L, E, 2] code bits of gate_up and of down
    linear_bits: dict[str, int]  # width of each open tensor, by parameter name
    group_size: int
    predicted_loss: float  # sum of the costs of all choices, see allocation/objective.py
    expert_bytes: int  # stored bytes of all routed experts
    total_bytes: int  # of all tensors
    folder_bytes: int  # of all files
    average_bits: float  # code bits per routed-expert weight, the paper's k
    expert_bits_per_weight: float  # stored bits per routed-expert weight, side data included
    bits_per_weight: float  # stored bits per weight of the whole model
    recipe: Recipe
    provenance: dict[str, str]
    # Those of `layers` whose experts get scaled inputs, rounding/pre_quant_scale.py.
    scaled_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bits = np.array(self.bits, dtype=np.float64)  # a copy, so that no caller can change it
        bits.setflags(write=False)
        object.__setattr__(self, "bits", bits)
        if wrong := self._contradiction():
            raise CheckpointError(
                f"The plan does not fit together: {wrong}. Make it again with `moepress allocate`."
            )

    def _contradiction(self) -> str | None:
        """What is wrong with the plan, and what was expected; None if nothing is."""
        shape, count = self.bits.shape, len(self.layers)
        if len(shape) != 3 or shape[0] != count or shape[2] != len(PROJECTIONS) or not shape[1]:
            return f"widths of shape {shape}, expected [L, E, 2] with L = {count} layers"
        if list(self.layers) != sorted(set(self.layers)) or not count:
            return f"layers {self.layers}, expected distinct ones in rising order"
        if not set(self.scaled_layers) <= set(self.layers):
            return f"scaled inputs in layers {self.scaled_layers}, expected some of {self.layers}"
        used = [width(bits) for bits in np.unique(self.bits).tolist()]
        if not set(used) <= set(self.recipe.expert_bits):
            return f"widths {used}, expected some of {self.recipe.expert_bits}"
        left_out = self.bits == LEFT_OUT
        if (left_out[..., 0] != left_out[..., 1]).any():
            return "an expert with one projection left out, expected both or neither"
        widths = {*self.recipe.linear_bits, *TABLE_BITS}
        if not set(self.linear_bits.values()) <= widths:
            return f"linears of {set(self.linear_bits.values())}, expected some of {widths}"
        if self.group_size not in GROUP_SIZES:
            return f"group size {self.group_size}, expected one of {GROUP_SIZES}"
        sizes = (self.expert_bytes, self.total_bytes, self.folder_bytes)
        if not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            return f"experts, tensors and files of {sizes} bytes, expected rising numbers"
        rates = (self.average_bits, self.expert_bits_per_weight, self.bits_per_weight)
        if not all(0 < rate < math.inf for rate in rates) or rates[0] > rates[1]:
            return f"code bits, stored expert bits and stored bits per weight of {rates}"
        if not 0 <= self.predicted_loss < math.inf:
            return f"a predicted loss of {self.predicted_loss}, expected a finite number from 0 up"
        if not isinstance(self.provenance, dict):
            return f"provenance {self.provenance!r}, expected names and values"
        return None

    def digest(self) -> str:
        """A short hash of all widths, and of the layers whose experts get scaled inputs."""
        numbers = bytes(width_number(bits) for bits in self.bits.flat)
        linears = json.dumps(self.linear_bits, sort_keys=True) if self.linear_bits else ""
        scaled = json.dumps(self.scaled_layers) if self.scaled_layers else ""
        return hashlib.sha256(numbers + linears.encode() + scaled.encode()).hexdigest()[:16]

    def widths(self) -> list[list[tuple[float, float]]]:
        """By layer and expert, the code bits of gate_up and of down: int where they are whole."""
        return [[(width(a), width(b)) for a, b in row] for row in self.bits.tolist()]

    def save(self, path: Path) -> None:
        """Write JSON atomically, widths as `spell_widths`. Equal plans give equal bytes.

        Raises:
            CheckpointError: the file cannot be written.
        """
        rows = [
            {
                "layer": layer,
                **{n: spell_widths(row[:, p].tolist()) for p, n in enumerate(PROJECTIONS)},
            }
            for layer, row in zip(self.layers, self.bits, strict=True)
        ]
        fields = {k: v for k, v in vars(self).items() if k not in ("layers", "bits")}
        save_json(path, {"kind": KIND, **fields, "recipe": self.recipe.to_dict(), "layers": rows})

    @classmethod
    def load(cls, path: Path) -> BitAllocation:
        """Read what `save` wrote.

        Raises:
            InputError: the file is JSON, but not a plan, or another file of moepress.
            FileError: it is missing or damaged, or its fields contradict each other.
        """
        with expecting(path, "a plan", "moepress allocate"):
            fields = read_json(path, "The plan")
        if not isinstance(fields, dict) or fields.pop("kind", None) != KIND:
            raise InputError(
                f"{path} is not a plan. Expected a file made by `moepress allocate`, or "
                "moepress_plan.json in a compressed folder."
            )
        parse(PlanFields, fields, f"The plan {path}", AGAIN)
        try:
            rows, scaled = fields.pop("layers"), fields.pop("scaled_layers", ())
            bits = [[read_widths(row[n]) for n in PROJECTIONS] for row in rows]
            if "linear_bits" not in fields:  # of a version whose linears were all scalar and fixed
                fields["linear_bits"] = {}
                fields["recipe"] = FAST.to_dict() | BEFORE | fields["recipe"]
            return cls(
                **fields | {"recipe": Recipe.from_dict(BEFORE | fields["recipe"])},
                scaled_layers=tuple(scaled),
                layers=tuple(int(row["layer"]) for row in rows),
                bits=np.array(bits, dtype=np.float64).swapaxes(1, 2),
            )
        except (TypeError, KeyError, ValueError, OverflowError, CheckpointError) as error:
            raise FileError(
                f"{path} is a damaged plan ({type(error).__name__}: {error}). {AGAIN}"
            ) from error
