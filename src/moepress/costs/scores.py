"""Scores: the measured cost of each width of each routed expert and each open tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from moepress.errors import CheckpointError, FileError, InputError
from moepress.format.arrays import read_arrays, read_document
from moepress.format.checkpoint import save_tensors
from moepress.reading.documents import Array, Document, Pair
from moepress.recipe import BEFORE, FIELDS_AFTER_SCORING, Recipe
from moepress.writing.ours import expecting

EXPERT_ARRAYS = (
    "tokens", "routing_weight", "squared_error", "cost", "output_energy", "residual_energy",
)  # fmt: skip
ARRAYS = (*EXPERT_ARRAYS, "linear_bytes", "linear_cost")
TUPLES = (
    "layers", "bits", "linears", "text_tokens", "linear_bits", "gate_up_shape", "down_shape",
    "scaled_layers",
)  # fmt: skip
KIND = "moepress scores"
ROUNDED = ("gate_up", "down", "both")  # the projections that are rounded when an error is measured
BOTH = 2  # index in ROUNDED of an expert rounded whole
# Fields that have another name in the file.
STORED_AS = {"text_tokens": "source_tokens", "other_weights": "fixed_weights"}
DTYPES = {
    "tokens": "int64", "routing_weight": "float64", "squared_error": "float64", "cost": "float64",
    "output_energy": "float64", "residual_energy": "float64", "linear_bytes": "int64",
    "linear_cost": "float64 or inf",
}  # fmt: skip
AGAIN = "Score again."
MOST_TOKENS = 1 << 48  # of the sequences and lengths that recipes may have

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]


class ScoresFields(Document):
    """The document in the file, without its kind."""

    layers: Array[Annotated[int, Field(ge=0, lt=1 << 16)]]
    bits: Array[float]
    linears: Array[str]
    linear_bits: Array[float]
    total_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    source_tokens: Array[Annotated[int, Field(ge=0, le=MOST_TOKENS)]]
    gate_up_shape: Pair[Size]
    down_shape: Pair[Size]
    fixed_bytes: Count
    fixed_weights: Count
    file_bytes: Count
    group_size: int
    provenance: dict[str, str]
    recipe: dict[str, Any] = Field(default_factory=dict)
    scaled_layers: Array[Annotated[int, Field(ge=0, lt=1 << 16)]] = ()


@dataclass(frozen=True)
class ExpertScores:
    """Routing statistics, errors and costs of every routed expert, and costs of open tensors.

    L MoE layers, E experts, B widths, D calibration texts. M open tensors with W widths: linears,
    embedding and head. M is 0 if the recipe fixes all widths.
    """

    layers: tuple[int, ...]  # [L] index of each MoE layer in the model
    bits: tuple[float, ...]  # [B] widths measured, rising
    tokens: npt.NDArray[np.int64]  # [L, E] scored tokens routed to each expert
    routing_weight: npt.NDArray[np.float64]  # [L, E] sum of routing weights
    squared_error: npt.NDArray[np.float64]  # [L, E, 3, B] epsilon^2, by ROUNDED
    # [D, L, E, 3, B] predicted loss, in proportion to text_tokens; the sum over D is the total
    cost: npt.NDArray[np.float64]
    linears: tuple[str, ...]  # [M] parameter names of the open tensors
    linear_bits: tuple[int, ...]  # [W] widths measured, rising
    linear_bytes: npt.NDArray[np.int64]  # [M, W] stored; 0 where a width is not offered
    linear_cost: npt.NDArray[np.float64]  # [D, M, W]; infinite where a width is not offered
    output_energy: npt.NDArray[np.float64]  # [L] sum of squares of the MoE block's routed output
    residual_energy: npt.NDArray[np.float64]  # [L] of the layer's output states (walk.py)
    total_tokens: int  # N, scored tokens: those that costs are measured on (scored.py)
    text_tokens: tuple[int, ...]  # [D] number of tokens of each text, scored or not
    # Rows, columns of one expert's fused gate and up projection, and of down, without padding.
    gate_up_shape: tuple[int, int]
    down_shape: tuple[int, int]
    fixed_bytes: int  # bytes in the compressed folder of all fixed tensors
    other_weights: int  # number of weights outside the routed experts, open tensors included
    file_bytes: int  # bytes of the folder without its tensors: tokenizer, JSON files, headers
    group_size: int
    provenance: dict[str, str]  # model, text and recipe that the scores depend on
    recipe: dict[str, Any] = field(default_factory=dict)  # the recipe of the measurement
    # Those of `layers` whose experts get scaled inputs, rounding/pre_quant_scale.py.
    scaled_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or 0 in self.tokens.shape:
            raise CheckpointError(
                f"Scores have tokens of shape {self.tokens.shape}. Expected layers and experts."
            )
        count, experts = self.tokens.shape
        expected = (count, experts, len(ROUNDED), len(self.bits))
        linears = (len(self.linears), len(self.linear_bits))
        (rows, hidden), (hidden_again, inner) = self.gate_up_shape, self.down_shape
        tables = self.gate_up_shape == self.down_shape
        if not tables and (hidden != hidden_again or rows not in (inner, 2 * inner)):
            raise CheckpointError(
                f"Scores are of experts with matrices {self.gate_up_shape} and {self.down_shape}. "
                "Expected [2I, H] and [H, I], or [I, H] and [H, I] or [I, H]. Score again."
            )
        if (
            len(self.layers) != count
            or self.squared_error.shape != expected
            or self.cost.shape != (len(self.text_tokens), *expected)
            or self.routing_weight.shape != self.tokens.shape
            or {self.output_energy.shape, self.residual_energy.shape} != {(count,)}
            or self.linear_bytes.shape != linears
            or self.linear_cost.shape != (len(self.cost), *linears)
        ):
            raise CheckpointError(
                f"Scores do not fit together: {len(self.layers)} layers, tokens "
                f"{self.tokens.shape}, errors {self.squared_error.shape}, costs {self.cost.shape}, "
                f"expected {expected}; linears {self.linear_bytes.shape} and "
                f"{self.linear_cost.shape}, expected {linears}."
            )

    @property
    def all_tokens(self) -> int:
        """Number of calibration tokens, scored or not."""
        return max(sum(self.text_tokens), self.total_tokens)

    @property
    def reached(self) -> npt.NDArray[np.int64]:
        """[L, E] about how many of all calibration tokens choose each expert."""
        about = self.tokens.astype(np.float64) * self.all_tokens // max(self.total_tokens, 1)
        return np.minimum(about, 2.0**62).astype(np.int64)  # damaged counts may be huge

    @property
    def frequency(self) -> npt.NDArray[np.float64]:
        """phi [L, E]: share of the tokens that choose the expert."""
        return self.tokens / self.total_tokens

    @property
    def mean_weight(self) -> npt.NDArray[np.float64]:
        """w [L, E]: routing weight averaged over all tokens."""
        return self.routing_weight / self.total_tokens

    @property
    def linear_offered(self) -> npt.NDArray[np.bool_]:
        """[M, W] whether an open tensor is offered a width."""
        return np.asarray(np.isfinite(self.linear_cost).all(axis=0))

    def save(self, path: Path) -> None:
        """Write one safetensors file: arrays as tensors, the rest as JSON in its metadata."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}
        rest = {STORED_AS.get(k, k): v for k, v in vars(self).items() if k not in ARRAYS}
        save_tensors(path, arrays, json.dumps({"kind": KIND, **rest}, sort_keys=True))

    def recipe_for(self, recipe: Recipe, **changes: Any) -> Recipe:
        """The recipe that these scores were measured with, with the allocation fields of `recipe`.

        Args:
            changes: more fields to set, such as the widths to choose from.
        """
        wanted = {k: v for k, v in recipe.to_dict().items() if k in FIELDS_AFTER_SCORING}
        return Recipe.from_dict({**self.recipe, **wanted, **changes})

    @classmethod
    def load(cls, path: Path) -> ExpertScores:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing or damaged, or holds no scores.
            InputError: it is another file of moepress.
        """
        with expecting(path, "scores", "moepress score"):
            rest = read_document(path, KIND, "scores", AGAIN)
        arrays = read_arrays(path, rest, ScoresFields, DTYPES, AGAIN)
        try:
            rest |= {name: rest.pop(stored) for name, stored in STORED_AS.items()}
            rest |= {name: tuple(rest.get(name, ())) for name in TUPLES}
            rest["recipe"] = BEFORE | rest.get("recipe", {})
            Recipe.from_dict(rest["recipe"])
            return cls(**{**rest, **arrays})
        except (InputError, CheckpointError) as error:
            raise FileError(f"{path} cannot be used: {error} {AGAIN}") from error
