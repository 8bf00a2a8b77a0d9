"""Routing statistics of each expert: phi and w of arXiv:2410.06270, eq. 3.

phi is how often an expert is chosen, w its mean routing weight. The same walk measures the cost of
dropping experts from tokens (costs/drop_costs.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from moepress.costs.drop_costs import ARRAYS as DROP_ARRAYS
from moepress.costs.drop_costs import DropCosts, DropFields, DropMeter, drop_seed
from moepress.errors import CheckpointError, FileError
from moepress.format.arrays import read_arrays, read_document
from moepress.format.checkpoint import save_tensors
from moepress.original.source import Source
from moepress.original.usable import check_usable
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.reading.documents import Array, Document
from moepress.recipe import Recipe
from moepress.work import calibration_ids, identity

KIND = "moepress calibration"
ARRAYS = ("tokens", "routing_weight")
DTYPES = {"tokens": "int64", "routing_weight": "float64"} | dict.fromkeys(DROP_ARRAYS, "float32")
AGAIN = "Calibrate again."


class CalibrationFields(Document):
    """The document in the file, without its kind."""

    layers: Array[Annotated[int, Field(ge=0, lt=1 << 16)]]
    total_tokens: Annotated[int, Field(ge=1, lt=1 << 63)]
    token_floor: Annotated[int, Field(ge=0, lt=1 << 63)]
    drop_costs: DropFields
    provenance: dict[str, str]


@dataclass(frozen=True)
class Calibration:
    """Routing statistics of every routed expert. L MoE layers, E experts."""

    layers: tuple[int, ...]  # [L] decoder layer of each row
    tokens: npt.NDArray[np.int64]  # [L, E] calibration tokens routed to each expert
    routing_weight: npt.NDArray[np.float64]  # [L, E] sum of their routing weights
    total_tokens: int  # N
    token_floor: int  # an expert with fewer tokens borrows some, see rounding/tokens.py
    drop_costs: DropCosts  # of the original model
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 2 or 0 in shape or shape[0] != len(self.layers):
            raise CheckpointError(
                f"The calibration has tokens of shape {shape}. Expected {len(self.layers)} layers."
            )
        if self.routing_weight.shape != shape or self.drop_costs.layers != self.layers:
            raise CheckpointError(
                f"The calibration has routing weights of shape {self.routing_weight.shape} and "
                f"drop costs of layers {self.drop_costs.layers}. Expected {shape} and "
                f"{self.layers}."
            )

    @property
    def frequency(self) -> npt.NDArray[np.float64]:
        """phi [L, E]: share of the tokens that choose the expert."""
        return self.tokens / self.total_tokens

    @property
    def mean_weight(self) -> npt.NDArray[np.float64]:
        """w [L, E]: routing weight averaged over all tokens."""
        return self.routing_weight / self.total_tokens

    def below_floor(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of every expert that saw fewer tokens than the floor."""
        rows, experts = np.nonzero(self.tokens < self.token_floor)
        return [
            (self.layers[row], int(e), int(self.tokens[row, e]))
            for row, e in zip(rows, experts, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write one safetensors file: arrays as tensors, the rest as JSON in its metadata."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}
        rest = {k: v for k, v in vars(self).items() if k not in ARRAYS}
        rest["drop_costs"] = self.drop_costs.rest()
        about = json.dumps({"kind": KIND, **rest}, sort_keys=True)
        save_tensors(path, arrays | self.drop_costs.arrays(), about)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing or damaged, or holds no calibration.
        """
        fields = read_document(path, KIND, "calibration", AGAIN)
        arrays = read_arrays(path, fields, CalibrationFields, DTYPES, AGAIN)
        rest = fields.pop("drop_costs")
        drops = {name: arrays.pop(name) for name in DROP_ARRAYS}
        fields["layers"] = tuple(fields["layers"])
        try:
            costs = DropCosts(**{**rest, "layers": tuple(rest["layers"]), **drops})
            return cls(drop_costs=costs, **{**fields, **arrays})
        except CheckpointError as error:
            raise FileError(f"{path} cannot be used: {error} {AGAIN}") from error


def calibrate(source: Source | str | Path, recipe: Recipe) -> Calibration:
    """Run the calibration text through the model; measure routing statistics and drop costs.

    Args:
        source: the original model, its folder, or its hub id.
        recipe: names the text, its amount and the seed.
    """
    source = source if isinstance(source, Source) else Source(source)
    check_usable(source)
    ids = calibration_ids(source, recipe)
    walk = Walk(source, ids)
    rows = {}
    with Progress("calibrate", total=len(source.layers)) as progress:
        for layer in range(len(source.layers)):
            progress.update(layer=layer)
            with source.layer_loaded(layer):
                if layer in source.experts:
                    rows[layer] = calibrate_layer(walk, layer, recipe.seed)
                else:
                    walk.advance(layer, None)
            progress.advance()
    provenance = identity(source, recipe, ids)
    return Calibration(
        layers=tuple(rows),
        tokens=np.stack([row["tokens"].numpy() for row in rows.values()]),
        routing_weight=np.stack([row["routing_weight"].numpy() for row in rows.values()]),
        total_tokens=ids.numel(),
        token_floor=recipe.token_floor,
        drop_costs=DropCosts.of_layers(rows, provenance),
        provenance=provenance,
    )


def calibrate_layer(walk: Walk, layer: int, seed: int) -> dict[str, Tensor]:
    """Measure one loaded layer with experts, and bring the walk through it.

    Returns:
        Its rows of `tokens` and `routing_weight`, and its drop costs (`DropMeter.result`).
    """
    experts = walk.source.experts[layer].experts
    routed = walk.route(layer)
    tokens, weight = routed.statistics(experts)
    meter = DropMeter(routed, experts, drop_seed(seed, layer), ranks=walk.ranks)
    energy = walk.advance(layer, walk.experts_output(layer, routed, meter.add))
    drops = meter.result(energy / walk.tokens)
    return {"tokens": tokens, "routing_weight": weight, **drops}
