"""The cost of a routed expert at each width: errors of its output, measured on its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from moepress.costs.noisy_expert import NoisyExpert, noisy_experts, noisy_neurons
from moepress.costs.scores import ROUNDED
from moepress.costs.sketch import sketched
from moepress.costs.texts import Texts
from moepress.format.codec import LEFT_OUT
from moepress.original.batches import chunks, empty
from moepress.original.experts import ExpertWeights, RoutedExpert, expert_hidden, expert_output
from moepress.original.token_sums import TokenSums
from moepress.rounding.expert import (
    GateUp,
    Rounded,
    round_downs,
    round_gate_ups,
    rounded_expert,
)
from moepress.rounding.methods import Matrix
from moepress.rounding.options import Rounding
from moepress.sending import sent

Candidate = ExpertWeights | NoisyExpert
# An expert at every offered width; None: it is left out.
Offers = Iterable[Candidate | None]
# Gives them, for the inputs of the original `down` on the expert's tokens: [T_e, I], or [T_e, 1]
# where each token uses one neuron.
Offered = Callable[[Tensor], Offers]


def rounded_weights(
    experts: Sequence[RoutedExpert], rounding: Rounding, expert_bits: Sequence[float]
) -> Iterator[tuple[RoutedExpert, Offered]]:
    """Each expert as its costs see it, and that at every offered width, dequantized.

    It is a sketch of the expert (sketch.py) where errors are drawn. None stands for width 0, which
    leaves it out. Each projection is rounded, or gets the error that rounding would leave, on the
    inputs that it has while the other one is original. The weights of one width are made when they
    are asked for.
    """
    widths = [bits for bits in expert_bits if bits != LEFT_OUT]
    left_out = [None] * (LEFT_OUT in expert_bits)
    if rounding.draws:
        for expert in experts:
            yield _seen_drawn(expert, rounding, widths, left_out)
        return
    same = [widths] * len(experts)
    gate_ups = round_gate_ups(experts, rounding, same)
    originals = [GateUp(expert.weights.gate_up) for expert in experts]
    downs = round_downs(experts, originals, rounding, same)
    for expert, *matrices in zip(experts, gate_ups, downs, strict=True):
        yield expert, partial(_offered, left_out, partial(_dequantized, matrices, expert))


def _seen_drawn(
    expert: RoutedExpert, rounding: Rounding, widths: Sequence[float], left_out: Offers
) -> tuple[RoutedExpert, Offered]:
    """An expert as its costs see it, and with drawn errors."""
    if expert.routed.neuron is not None:
        return expert, lambda _: chain(left_out, noisy_neurons(expert, rounding, widths))
    seen = sketched(expert, rounding.tokens.seed)
    return seen, partial(_offered, left_out, partial(noisy_experts, expert, seen, rounding, widths))


def _offered(left_out: Offers, others: Offered, hidden: Tensor) -> Offers:
    return chain(left_out, others(hidden))


def _dequantized(
    matrices: Sequence[Sequence[Matrix]], expert: RoutedExpert, _: Tensor
) -> Iterator[ExpertWeights]:
    """Rounded weights, from gate_up and down at every width."""
    for gate_up, down in zip(*matrices, strict=True):
        yield rounded_expert(expert, Rounded(gate_up, down)).weights


def measure(
    expert: RoutedExpert,
    seen: RoutedExpert,
    offered: Offered,
    texts: Texts,
    output: TokenSums,
) -> tuple[Tensor, Tensor]:
    """Squared error of an expert's output, and its cost, at every offered width.

    Args:
        expert: with its original weights.
        seen: the same as its costs see it: a sketch (sketch.py), or `expert` itself.
        offered: gives `seen` at each width, one in memory at a time; None: left out.
        output: gets the expert's exact output.

    Returns:
        Squared errors [3, B] float64 by ROUNDED: gate_up alone, down alone, both rounded. And costs
        [D, 3, B] float64: the same errors for each text, weighted by the tokens' sensitivities.
    """
    hidden, exact = _originals(expert, seen, output)
    squares = []  # by width; a card is waited for once
    for candidate in offered(hidden):
        squares.append(_squares(seen, candidate, hidden, exact))
        del candidate  # before the next one is made
    sums = [_sums(expert, squared, texts) for squared in torch.stack(squares).cpu()]
    errors, costs = zip(*sums, strict=True)
    return torch.stack(errors, -1), torch.stack(costs, -1)


def _squares(
    expert: RoutedExpert, candidate: Candidate | None, hidden: Tensor, exact: Tensor
) -> Tensor:
    """Squared errors [3, T_e] float64 of the outputs with each of ROUNDED."""
    tokens, device = expert.tokens, expert.weights.down.device
    squares = torch.empty(len(ROUNDED), len(tokens), dtype=torch.float64, device=device)
    for chunk in chunks(tokens):
        for row, squared in enumerate(_errors(expert, candidate, chunk, hidden, exact)):
            squares[row, chunk] = squared
    return squares


def _sums(expert: RoutedExpert, squares: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
    """Squared errors [3] and costs [D, 3] of an expert at one width.

    Args:
        squares: [3, T_e] float64 squared errors of its tokens, on the CPU.
    """
    error = torch.zeros(len(ROUNDED), dtype=torch.float64)
    cost = torch.zeros(texts.count, len(ROUNDED), dtype=torch.float64)
    for chunk in chunks(expert.tokens):
        token = expert.tokens[chunk]
        for row, squared in enumerate(squares[:, chunk]):
            error[row] += squared.sum()
            if expert.routed.sensitivity is not None:
                squared = squared * expert.routed.sensitivity[token]
            cost[:, row] += texts.sums(squared, token)
    return error, cost


def _originals(
    expert: RoutedExpert, seen: RoutedExpert, output: TokenSums
) -> tuple[Tensor, Tensor]:
    """The inputs of down and the weighted output of the original expert.

    The inputs are [T_e, I], or [T_e, 1] where each token uses one neuron. The output is [T_e, H]
    float32, or [T_e, m] of a sketch.

    Args:
        seen: a sketch, or `expert` itself.
        output: gets the output of the expert.
    """
    weights, own = expert.weights, len(expert.tokens)
    device = weights.down.device
    outer = expert.routed.hidden.shape[1] if seen is expert else len(seen.weights.down)
    hidden = empty((own, expert.inner), weights.down.dtype, device)
    exact = empty((own, outer), torch.float32, device)
    for chunk in chunks(expert.tokens):
        x, neurons = expert.inputs(chunk), expert.neurons(chunk)
        module, size = expert.module, x.shape[1]
        inside = expert_hidden(module, weights.gate_up, x, weights.gate_up_bias, neurons)
        y = expert_output(module, weights.down, inside, size, weights.down_bias, neurons)
        output.add(expert, chunk, y)
        if seen is not expert:
            y = expert_output(seen.module, seen.weights.down, inside, outer, seen.weights.down_bias)
        hidden[chunk], exact[chunk] = inside, y.float() * sent(expert.gate[chunk, None], device)
    return hidden, exact


def _errors(
    expert: RoutedExpert,
    candidate: Candidate | None,
    chunk: slice,
    hidden: Tensor,
    exact: Tensor,
) -> Iterator[Tensor]:
    """Squared errors [t] float64 of the outputs for a chunk of tokens, with each of ROUNDED."""
    device = expert.weights.down.device
    right = sent(exact[chunk], device)
    gate = sent(expert.gate[chunk, None], device)
    for y in _outputs(expert, candidate, sent(hidden[chunk], device), chunk):
        error = right if y is None else y.float() * gate - right
        yield error.square().sum(1).double()


def _outputs(
    expert: RoutedExpert, candidate: Candidate | None, hidden: Tensor, chunk: slice
) -> Iterator[Tensor | None]:
    """The expert's outputs with each of ROUNDED; None if the expert is left out.

    Args:
        candidate: the rounded expert; None: left out.
        hidden: [t, I or 1] inputs of down that the original gate and up give.
        chunk: of the expert's tokens.
    """
    if candidate is None:
        yield from (None,) * len(ROUNDED)
        return
    module, original = expert.module, expert.weights
    x, neurons = expert.inputs(chunk), expert.neurons(chunk)
    if isinstance(candidate, NoisyExpert):
        changed = candidate.hidden(expert, x)
    else:
        changed = expert_hidden(module, candidate.gate_up, x, original.gate_up_bias, neurons)
    for inner, down in (
        (changed, original.down),
        (hidden, candidate.down),
        (changed, candidate.down),
    ):
        yield expert_output(module, down, inner, x.shape[1], original.down_bias, neurons)
