"""A routed expert with drawn errors at every width, for costs without rounding.

Of gate and up only the products with the expert's tokens are needed: their errors are drawn
(rounding/noisy_products.py). What `down` [H, I] makes of the result has few rows, a sketch's
(sketch.py): the errors of its weights are drawn (rounding/noise.py). Where a token chooses neurons,
those of both matrices are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.blocks.form import apply_gate
from moepress.blocks.layout import widened
from moepress.costs.scores import ROUNDED
from moepress.costs.sketch import sketch_rows
from moepress.original.experts import ExpertWeights, RoutedExpert
from moepress.rounding.expert import down_inputs, gate_up_inputs
from moepress.rounding.factor import Factor
from moepress.rounding.held_out import held_out
from moepress.rounding.inputs import Inputs
from moepress.rounding.noise import draw, draw_ahead, noisy_weights
from moepress.rounding.noisy_products import (
    SHARED,
    NoisyProducts,
    add_noise,
    noisy_products,
    rows_of_sample,
)
from moepress.rounding.options import Rounding
from moepress.sending import sent

GATE_UP, DOWN = ROUNDED[:2]
OUTPUTS = "outputs of gate_up"  # the name of the noise of the products


@dataclass(frozen=True, eq=False)
class NoisyExpert:
    """An expert with errors of one width.

    Attributes:
        products: with gate and up.
        noise: [SHARED, R] float32, of these; see `add_noise`.
        down: [m, I], the rows of the sketch with errors.
    """

    products: NoisyProducts
    noise: Tensor
    down: Tensor

    def hidden(self, expert: RoutedExpert, x: Tensor) -> Tensor:
        """Inner activations [t, I], see `expert_hidden`.

        Args:
            x: [t, H], inputs of the expert.
        """
        weights = expert.weights
        mean, deviation = self.products.of(widened(x, weights.gate_up.shape[1]))
        products = F.linear(mean, weights.gate_up, weights.gate_up_bias)
        add_noise(products, deviation, self.noise)
        return apply_gate(expert.module, products)


def noisy_experts(
    expert: RoutedExpert,
    seen: RoutedExpert,
    rounding: Rounding,
    widths: Sequence[float],
    hidden: Tensor,
) -> Iterator[NoisyExpert]:
    """An expert with drawn errors at every width.

    Args:
        seen: its sketch, or itself.
        hidden: [T_e, I], inputs of the original down.
    """
    weight, down, seed = expert.weights.gate_up, seen.weights.down, rounding.tokens.seed
    own = len(expert.tokens)
    factor, larger = _factored(gate_up_inputs(expert, rounding), rounding, own)
    sample = _drawn(expert, GATE_UP, seed)
    products = noisy_products(weight, widths, factor, sample, larger)
    size = weight.float().square().mean(1).sqrt()
    noise = sent(_drawn(expert, OUTPUTS, seed), weight.device) * size

    factor, larger = _factored(down_inputs(expert, weight, rounding, hidden), rounding, own)
    sample, code_rows = _drawn(expert, DOWN, seed), len(expert.weights.down)
    downs = noisy_weights(down, widths, factor, sample, code_rows, larger)
    del factor, sample
    for _ in widths:  # no name holds what is made for a width while that of the next is made
        yield NoisyExpert(next(products), noise, next(downs))


def noisy_neurons(
    expert: RoutedExpert, rounding: Rounding, widths: Sequence[float]
) -> Iterator[ExpertWeights]:
    """An expert of which each token uses one neuron, with drawn errors at every width.

    `down` is a table with a row for each neuron. It is rounded without feedback (`round_downs`), so
    its drawn errors have none either: its Hessian is the identity.
    """
    weights, seed, own = expert.weights, rounding.tokens.seed, len(torch.unique(expert.tokens))
    factor, larger = _factored(gate_up_inputs(expert, rounding), rounding, own)
    noise = _drawn(expert, GATE_UP, seed)
    gate_ups = noisy_weights(weights.gate_up, widths, factor, noise, larger=larger)
    columns = weights.down.shape[1]
    inputs = Inputs(columns, weights.down.device, rounding.family, False, tokens=columns)
    inputs.add(torch.eye(columns, device=weights.down.device), None)
    factor = inputs.factor(rounding.damping)
    downs = noisy_weights(weights.down, widths, factor, _drawn(expert, DOWN, seed))
    for _ in widths:
        yield weights._replace(gate_up=next(gate_ups), down=next(downs))


def _factored(inputs: Inputs, rounding: Rounding, own: int) -> tuple[Factor, Tensor]:
    """The factor of the inputs' Hessian, and how much larger errors are on other tokens.

    Args:
        own: number of the expert's own tokens. They were added first, and costs are theirs alone.
    """
    factor = inputs.factor(rounding.damping)
    return factor, held_out(factor, inputs.weights, own)


def draw_experts_ahead(numbers: Sequence[int], like: RoutedExpert, rounding: Rounding) -> None:
    """Begin to draw the noise of experts that will be scored soon.

    Args:
        like: an expert of the layer.
    """
    for number in numbers:
        for what, shape in _shapes(like).items():
            draw_ahead(shape, rounding.tokens.seed, _name(like.layer, number, what))


def _drawn(expert: RoutedExpert, what: str, seed: int) -> Tensor:
    """[K, N] noise of an expert, for a shape N, K of `_shapes`."""
    return draw(_shapes(expert)[what], seed, _name(expert.layer, expert.number, what))


def _shapes(expert: RoutedExpert) -> dict[str, tuple[int, int]]:
    """N, K of the noise that an expert takes, by its name."""
    rows, columns = expert.weights.gate_up.shape
    down = {DOWN: (sketch_rows(expert), expert.weights.down.shape[1])}
    if expert.routed.neuron is not None:
        return {GATE_UP: (rows, columns), **down}
    return {GATE_UP: (rows_of_sample(rows), columns), OUTPUTS: (rows, SHARED), **down}


def _name(layer: int, number: int, what: str) -> str:
    return f"layer {layer}, expert {number}, {what}"
