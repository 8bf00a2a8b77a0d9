"""The rule by which choices are dropped: thresholds by layer and rank, and who is protected."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from moepress.errors import InputError
from moepress.reading.documents import Array, Document, parse

if TYPE_CHECKING:
    from moepress.costs.drop_costs import DropCosts

logger = logging.getLogger(__name__)

NEARLY = 0.9  # of the asked share: if less than this can be dropped, a warning says so
PROTECT = 0.02  # share of a prefill's tokens that keep all experts, as in the paper

EXPECTED = (
    'Give {"thresholds": {layer: [0, ratio, ...]}, "renormalise": true or false, "protect": share}.'
)

Strength = float | str  # a share, "paper", or "disk:SHARE" (prune.py)


Share = Annotated[float, Field(ge=0, le=1)]
LayerNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$")]


class PruningFields(Document):
    """`Pruning` as JSON."""

    thresholds: dict[LayerNumber, Array[Share]]
    renormalise: bool
    protect: Share = PROTECT


@dataclass(frozen=True)
class Pruning:
    """Which choices are dropped: thresholds for w_r / w_1, by layer and rank."""

    thresholds: Mapping[int, tuple[float, ...]]  # decoder layer: [k] by rank; first 0
    renormalise: bool  # whether kept weights are scaled up to the sum of all
    protect: float = PROTECT  # share of a sequence's tokens that keep all experts in a prefill
    # Of a model whose experts are on disk: thresholds, by layer and rank, of choices whose expert
    # would have to be read; and the share of all choices up to which they are applied.
    absent: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    most: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.thresholds, Mapping) or not isinstance(self.renormalise, bool):
            raise InputError(
                f"Pruning has thresholds {self.thresholds!r} and renormalise {self.renormalise!r}. "
                "Expected ratios by decoder layer, and true or false."
            )
        for layer, ratios in (*self.thresholds.items(), *self.absent.items()):
            right = isinstance(layer, int) and layer >= 0 and isinstance(ratios, tuple) and ratios
            if not right or not all(_is_share(r) for r in ratios) or ratios[0] != 0:
                raise InputError(
                    f"Thresholds of layer {layer!r} are {ratios!r}. Expected one ratio for each "
                    "chosen expert, from 0 to 1, the first 0: a token's first expert is never "
                    "dropped."
                )
        if not _is_share(self.protect):
            raise InputError(f"protect is {self.protect!r}. Expected a share of tokens, 0 to 1.")

    @property
    def drops(self) -> bool:
        """Whether any choice can be dropped."""
        return any(map(any, (*self.thresholds.values(), *self.absent.values())))

    def check_layers(self, layers: Collection[int], model: str) -> None:
        """Raise InputError for thresholds of layers that a model has no routed experts in."""
        strangers = sorted(self.thresholds.keys() - set(layers))
        if strangers:
            raise InputError(
                f"The pruning has thresholds for layers {strangers}, but {model} has routed "
                f"experts in layers {sorted(layers)}. It was made for another model."
            )

    @classmethod
    def of(cls, costs: DropCosts, strength: Strength, protect: float = PROTECT) -> Pruning:
        """Thresholds for a strength, from measured costs.

        Args:
            costs: of the model.
            strength: "paper": each layer's median ratio of every rank, weights renormalised. A
                number: this share of all choices of experts, dropped where it costs least.
            protect: share of a prefill's tokens that keep all experts. Thresholds do not make up
                for them: the dropped share comes out smaller.

        Raises:
            InputError: the share cannot be dropped.
        """
        from moepress.pruning.thresholds import cheapest, dropped_share, medians

        if strength == "paper":
            ratios, renormalise = medians(costs), True
        elif isinstance(strength, str):
            raise InputError(f"Pruning {strength!r} is not known. Expected 'paper' or a share.")
        else:
            (plain_ratios, plain_cost), (scaled_ratios, scaled_cost) = (
                cheapest(costs, strength, renormalise) for renormalise in (False, True)
            )
            renormalise = scaled_cost < plain_cost
            ratios = scaled_ratios if renormalise else plain_ratios
            dropped = dropped_share(costs, ratios)
            if dropped < NEARLY * strength:
                logger.warning(
                    "%.3g of the chosen experts are to be dropped, but only about %.3g will be: "
                    "equal ratios of routing weights are dropped together or not at all, those of "
                    "their token's largest weight never, nor choices of experts that are left out",
                    strength, dropped,
                )  # fmt: skip
        rows = np.minimum(ratios, 1).tolist()
        return cls(dict(zip(costs.layers, map(tuple, rows), strict=True)), renormalise, protect)

    def to_json(self) -> dict[str, Any]:
        thresholds = {str(layer): list(ratios) for layer, ratios in self.thresholds.items()}
        return {
            "thresholds": thresholds,
            "renormalise": self.renormalise,
            "protect": self.protect,
        }

    def digest(self) -> str:
        """A short hash of the rule: of `to_json`."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def of_reads(
        cls,
        costs: DropCosts,
        share: float,
        missing: float,
        relative_time: float,
        protect: float = PROTECT,
    ) -> Pruning:
        """Thresholds for a model whose experts are on disk: those that save most time per loss.

        Args:
            costs: of the model.
            share: of all choices, the most that is dropped.
            missing, relative_time: as of `thresholds.cheapest_reads`.
            protect: as of `of`.

        Raises:
            InputError: the share cannot be dropped.
        """
        from moepress.pruning.thresholds import cheapest_reads

        plain, scaled = (
            cheapest_reads(costs, share, renormalise, missing, relative_time)
            for renormalise in (False, True)
        )
        renormalise = scaled[2] < plain[2]
        here, away = (
            dict(zip(costs.layers, map(tuple, np.minimum(rows, 1).tolist()), strict=True))
            for rows in (scaled if renormalise else plain)[:2]
        )
        return cls(here, renormalise, protect, away, share)

    @classmethod
    def from_json(cls, fields: Any) -> Pruning:
        """The inverse of `to_json`.

        Raises:
            FileError: the fields are not of a `Pruning`.
        """
        parse(PruningFields, fields, "The pruning", EXPECTED)
        thresholds = {int(n): tuple(ratios) for n, ratios in fields["thresholds"].items()}
        return cls(**{**fields, "thresholds": thresholds})


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
