"""Which formula a router has, found by trying: its own forward is the oracle.

Candidates are made from the names and the numbers that a module carries. The states that are tried
have one number each that is not 0, a power of 2: so logits are exact whatever the order of sums,
and choices can be compared one by one. (Sums of many numbers differ in the last bit, and with them
some choices.) How logits are rounded is seen from a few states with all numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moepress.errors import InputError
from moepress.hf.router_parts import RouterParts
from moepress.hf.trying import random_numbers
from moepress.kernels import route
from moepress.kernels.router import SCORES, Formula

SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
GROUPS = ("num_group", "n_group"), "topk_group"  # attributes: how many, and how many are kept
EPSILONS = (1e-20, 1e-6)  # beside a sum of weights; of less than 1e-6 it does not matter which

TRIED = 64  # states with one number each
SPREADS = (0.5, 1.0, 2.0, 4.0)  # of their logits, about
DENSE = 8  # states with all numbers
UNEQUAL = 4  # of TRIED, at most: among equal scores others may have been chosen
CLOSE = 4  # roundings of weights
CLOSE_LOGITS = {torch.float32: 1e-4, torch.float16: 0.002, torch.bfloat16: 0.01}  # of the largest

Outputs = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, k], indices [T, k]


@dataclass(frozen=True)
class Way:
    """How a router computes.

    Attributes:
        formula: what it computes.
        dims: how many dimensions hidden states may have, for results of two.
    """

    formula: Formula
    dims: tuple[int, ...]


def routed(
    hidden: Tensor, parts: RouterParts, correction: Tensor | None, formula: Formula
) -> Outputs:
    """The op for a router: hidden [T, H]. `correction`: where that is an argument."""
    if parts.correction is not None:
        correction = parts.correction.vector()
    bias = None if parts.bias is None else parts.bias.vector()
    return route(hidden, parts.weight, bias, correction, parts.top_k, *astuple(formula))


@torch.no_grad()
def find_way(
    module: nn.Module, parts: RouterParts, dtype: torch.dtype, known: Way | None = None
) -> Way | None:
    """How a router computes for hidden states of a dtype; None: no formula fits.

    Args:
        known: is tried alone, if given.
    """
    hidden = tried_states(parts.weight, dtype)
    correction = None
    if parts.corrected:
        correction = 0.1 * random_numbers((len(parts.weight),), hidden.device, torch.float32)
    dims, expected = _plain_outputs(module, hidden, correction)
    if expected is None:
        return None
    found: tuple[tuple[int, float], Way] | None = None
    formulas = _candidates(module, expected, dtype) if known is None else [known.formula]
    for formula in formulas:
        if found is not None and found[0] == (0, 0.0):
            break
        try:
            outputs = routed(hidden, parts, correction, formula)
        except InputError:  # such groups do not divide the experts, for example
            continue
        fit = _fit(outputs, expected, formula.product_dtype)
        if fit is not None and (found is None or fit < found[0]):
            found = fit, Way(formula, dims)
    return None if found is None else found[1]


def tried_states(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states [TRIED + DENSE, H] for a router's weight [E, H]."""
    cols, wide = weight.shape[1], weight.float()
    columns = torch.arange(TRIED, device=weight.device) * 7919 % cols
    spread = torch.tensor(SPREADS, device=weight.device).repeat(TRIED // len(SPREADS))
    deviation = wide[:, columns].std(0).clamp_min(1e-4)
    states = wide.new_zeros(TRIED + DENSE, cols)
    rows = torch.arange(TRIED, device=weight.device)
    states[rows, columns] = torch.exp2((spread / deviation).log2().round())
    dense = random_numbers((DENSE, cols), weight.device, torch.float32)
    states[TRIED:] = dense * (2 / (wide.std() * cols**0.5).clamp_min(1e-4))
    return states.to(dtype)


def _plain_outputs(
    module: nn.Module, hidden: Tensor, correction: Tensor | None
) -> tuple[tuple[int, ...], Outputs | None]:
    """What a module gives, and for which dimensions of its input; None: it is no router."""
    given = () if correction is None else (correction,)
    dims, found = [], None
    for x in (hidden, hidden[None]):
        try:
            outputs = module.forward(x, *given)
        except Exception:  # a module of another kind, or that expects other dimensions
            continue
        if _are_outputs(outputs, len(hidden)):
            dims.append(x.dim())
            found = outputs
    return tuple(dims), found


def _are_outputs(outputs: Any, tokens: int) -> bool:
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        return False
    if not all(isinstance(x, Tensor) and x.dim() == 2 and len(x) == tokens for x in outputs):
        return False
    logits, weights, index = outputs
    if not logits.is_floating_point() or not weights.is_floating_point():
        return False
    if index.dtype != torch.int64 or index.shape != weights.shape or not index.numel():
        return False
    return int(index.min()) >= 0 and int(index.max()) < logits.shape[1]


def _candidates(module: nn.Module, expected: Outputs, dtype: torch.dtype) -> Iterator[Formula]:
    """What a module may compute, by the dtypes of its outputs and its own numbers."""
    logits, weights, _ = expected
    dense = logits[TRIED:]
    rounded = torch.equal(dense.to(dtype), dense)
    base = Formula(
        "softmax",
        product_dtype=dtype if rounded else torch.float32,
        logits_dtype=logits.dtype,
        weights_dtype=weights.dtype,
    )
    normalised = [(False, 0.0), *((True, epsilon) for epsilon in EPSILONS)]
    scales = {1.0} | {float(x) for x in _numbers(module, SCALES)}
    dtypes = dict.fromkeys((torch.float32, logits.dtype, weights.dtype))
    for score, (normalise, epsilon), scale, (groups, kept, best), score_dtype in product(
        SCORES, normalised, sorted(scales), _groups(module), dtypes
    ):
        yield replace(
            base,
            score=score,
            normalise=normalise,
            epsilon=epsilon,
            scale=scale,
            groups=groups,
            kept_groups=kept,
            group_best=best,
            score_dtype=score_dtype,
        )


def _numbers(module: nn.Module, names: Sequence[str]) -> list[float]:
    found = [getattr(module, name, None) for name in names]
    return [x for x in found if isinstance(x, int | float) and not isinstance(x, bool)]


def _groups(module: nn.Module) -> list[tuple[int, int, int]]:
    """How many groups, how many of them are kept, and by how many of their choices."""
    names, kept = GROUPS
    found = [(1, 1, 2)]
    for groups, best in product(_numbers(module, names), _numbers(module, (kept,))):
        if groups > 1:
            found += [(int(groups), int(best), 2), (int(groups), int(best), 1)]
    return found


def _fit(found: Outputs, expected: Outputs, product_dtype: torch.dtype) -> tuple[int, float] | None:
    """How far results are from a module's; None: too far.

    Returns:
        states of TRIED for which others are chosen, and the largest error of a weight, relative.
    """
    logits, weights, index = (x[:TRIED] for x in found)
    if found[0].shape != expected[0].shape or found[1].shape != expected[1].shape:
        return None
    if not torch.equal(logits, expected[0][:TRIED]):
        return None
    dense, wanted_dense = (x[0][TRIED:].float() for x in (found, expected))
    far = float((dense - wanted_dense).abs().max() / wanted_dense.abs().max())
    if not far < CLOSE_LOGITS[product_dtype]:
        return None
    wanted_logits = logits.gather(1, expected[2][:TRIED])
    same = (_falling(logits.gather(1, index)) == _falling(wanted_logits)).all(1)
    unequal = int((~same).sum())
    if unequal > UNEQUAL:
        return None
    # Experts of equal logits may change places; each choice's weight stands beside its logit.
    wanted = _paired(expected[1][:TRIED], wanted_logits)[same]
    error = (_paired(weights, logits.gather(1, index))[same] - wanted).abs()
    far = float((error / wanted.clamp_min(1e-6)).max())
    if not far <= CLOSE * torch.finfo(weights.dtype).eps + 1e-6:
        return None
    return unequal, far


def _paired(weights: Tensor, logits: Tensor) -> Tensor:
    """Weights in the order of falling logits; those of equal logits by falling weight."""
    by_weight = weights.float().argsort(dim=-1, descending=True)
    order = logits.gather(1, by_weight).argsort(dim=-1, descending=True, stable=True)
    return weights.float().gather(1, by_weight).gather(1, order)


def _falling(x: Tensor) -> Tensor:
    return x.sort(dim=-1, descending=True).values
