"""What a compression has to do: model, recipe, text, and the widths that are expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moepress.costs.scored import scored_count, wanted_tokens
from moepress.original.batches import BATCH_TOKENS
from moepress.recipe import Recipe
from moepress.workload.shapes import Layer, ModelShape


@dataclass(frozen=True)
class Widths:
    """Widths that a plan is expected to give, for the stage that applies it."""

    experts: Mapping[tuple[float, float], int]  # number of experts, by widths of gate_up and down
    tensors: Mapping[str, float]  # of each packed linear and table, by name


@dataclass(frozen=True)
class Task:
    """What is compressed: a model, a recipe, an amount of text."""

    shape: ModelShape
    recipe: Recipe
    sequences: int
    length: int  # tokens of a sequence
    open: Mapping[str, tuple[int, ...]]  # widths offered to each open tensor, by name
    tables: Mapping[str, tuple[int, int]]  # shape of embedding and head, by name
    head: tuple[str, ...]  # names of the tables that are a head
    between: tuple[int, ...]  # bytes of a token before each layer and after the last: states,
    # and what layers hand on beside them; in a loop of all its passes
    runs: float = 1  # how often each token counts: in a loop, once for each pass

    @property
    def tokens(self) -> int:
        return round(self.sequences * self.length * self.runs)

    @property
    def states(self) -> int:
        """Bytes of all tokens between two layers, at most."""
        return self.sequences * self.length * max(self.between)

    @property
    def batches(self) -> int:
        """Batches of a walk."""
        one_pass = -(-self.sequences // max(1, BATCH_TOKENS // self.length))
        return round(one_pass * self.runs)

    @property
    def scored(self) -> Task:
        """The task with the sequences that costs are measured on."""
        wanted, texts = wanted_tokens(self.recipe), len(self.recipe.calib)
        count = scored_count(self.sequences, self.length, texts, self.shape.used, wanted)
        return replace(self, sequences=count)

    def at(self, layer: Layer) -> Task:
        """The task with the tokens that go through a layer."""
        return replace(self, runs=layer.runs)

    @property
    def at_most(self) -> Task:
        """The task with the tokens of the layers that run most often."""
        return replace(self, runs=max(layer.runs for layer in self.shape.layers))

    @property
    def at_experts(self) -> Task:
        """The task with the tokens that go through a layer with experts, in the mean."""
        runs = [layer.runs for layer in self.shape.layers if layer.has_experts]
        return replace(self, runs=sum(runs) / len(runs))

    @property
    def hessian_tokens(self) -> int:
        """Tokens of an expert's Hessian."""
        own = min(self.shape.expert_tokens(self.tokens), self.tokens)
        return max(own, min(self.recipe.token_floor, self.tokens))
