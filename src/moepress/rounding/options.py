"""The fields of a recipe that rounding reads, for routed experts or for the other linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moepress.format.codec import Codec, codec_for, stored_family
from moepress.recipe import NOISE, Recipe
from moepress.rounding.massive import bounded
from moepress.rounding.methods import needs_hessian
from moepress.rounding.tokens import TokenPolicy


@dataclass(frozen=True)
class Rounding:
    """How all matrices of one kind are rounded."""

    quantizer: str  # a key of rounding.methods.QUANTIZERS, or NOISE while scoring
    family: str  # of codecs; widths that the family lacks are scalar
    group_size: int  # rows that it does not divide take a smaller one
    damping: float  # of the Hessian, in units of the mean of its diagonal
    correction: float  # share of the errors of earlier layers that the weights make up for
    tokens: TokenPolicy  # which tokens make the Hessian of a routed expert
    balance: bool = False  # evenly scaled channels, balance.py, channel_scale.py

    @classmethod
    def of_experts(cls, recipe: Recipe, quantizer: str) -> Rounding:
        return cls._of(recipe, quantizer, recipe.expert_codec)

    @classmethod
    def of_linears(cls, recipe: Recipe, quantizer: str) -> Rounding:
        """For all linears but the routed experts."""
        return cls._of(recipe, quantizer, recipe.linear_codec)

    @classmethod
    def _of(cls, recipe: Recipe, quantizer: str, family: str) -> Rounding:
        if quantizer == NOISE and family != "trellis":
            quantizer = "gptq"  # only errors of trellis codes are drawn
        policy = TokenPolicy(recipe.hessian_weight == "routing", recipe.token_floor, recipe.seed)
        return cls(
            quantizer,
            family,
            recipe.group_size,
            recipe.damping,
            recipe.correction,
            policy,
            recipe.balance,
        )

    def codec(self, bits: float, cols: int) -> Codec:
        """The codec of a matrix [N, cols] at a width."""
        return codec_for(bits, cols, self.group_size, stored_family(bits, self.family))

    def token_weights(self, x: Tensor, weight: Tensor | None = None) -> Tensor | None:
        """Weights [T] of some tokens in a Hessian; None: 1 each.

        Where the recipe asks for the H of the paper (`hessian_weight="none"`), massive inputs count
        in full.

        Args:
            x: [T, K], inputs of a matrix.
            weight: [T], what `hessian_tokens` gives; None: 1.
        """
        return bounded(x, weight) if self.tokens.by_routing_weight else weight

    @property
    def draws(self) -> bool:
        """Whether errors are drawn instead of rounding, noise.py."""
        return self.quantizer == NOISE

    @property
    def needs_hessian(self) -> bool:
        return self.draws or needs_hessian(self.quantizer)

    @property
    def corrects(self) -> bool:
        """Whether weights make up for errors of earlier layers; round to nearest cannot."""
        return self.correction > 0 and self.needs_hessian
