"""What a router computes: which experts a token gets, and with what weights.

    logits = x W^T + bias
    scores = softmax, sigmoid or the like of the logits
    choice = the k greatest scores, after a correction that counts for the choice alone
    weights = the scores of the chosen, normalised, scaled

Models differ in these steps and in where they round to 16 bits; `Formula` says how. `route` is the
op `moepress::route` in plain PyTorch, the definition of correct.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.errors import InputError

# "chosen": the softmax of the chosen logits alone; experts are chosen by their logits. The order is
# that of the enums in cuda/choice.cuh and cpu/route_choice.h.
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "chosen")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Formula:
    """How a router gets from logits to weights.

    Attributes:
        score: one of `SCORES`.
        normalise: whether weights are divided by their sum + epsilon.
        epsilon: see `normalise`.
        scale: that weights are multiplied by, at last.
        groups: into which the experts are divided, neighbours together; 1: none.
        kept_groups: the best of them, from which is chosen.
        group_best: the worth of a group is the sum of its best so many choices: 1 or 2.
        product_dtype: to which logits are rounded, as F.linear rounds.
        logits_dtype: in which they are returned.
        score_dtype: of scores and of what is computed from them.
        weights_dtype: of the result.
    """

    score: str
    normalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 2
    product_dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype = torch.float32
    score_dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.float32

    def choice_dtype(self, correction: Tensor | None) -> torch.dtype:
        """That of scores with the correction, as PyTorch promotes."""
        if self.score == "chosen":  # logits, as floats
            return torch.float32
        if correction is None:
            return self.score_dtype
        return torch.promote_types(self.score_dtype, correction.dtype)


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    formula: Formula,
) -> None:
    """Raise InputError where the arguments of a call do not fit each other."""
    experts = weight.shape[0]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(
            "Expected hidden states [T, H] and the router's weight [E, H]; got "
            f"{list(hidden.shape)} and {list(weight.shape)}."
        )
    for name, vector in (("bias", bias), ("correction", correction)):
        if vector is not None and vector.shape != (experts,):
            raise InputError(f"{name} must be [{experts}], got {list(vector.shape)}.")
    groups, kept, size = formula.groups, formula.kept_groups, experts // max(1, formula.groups)
    equal = groups >= 1 and experts % groups == 0
    if not equal or not 1 <= kept <= groups or formula.group_best not in (1, 2):
        raise InputError(
            f"Of {experts} experts in {groups} groups, {kept} groups are kept, by their best "
            f"{formula.group_best} choices. Expected equal groups, and 1 or 2 choices."
        )
    if not 1 <= top_k <= size * kept:
        raise InputError(f"top_k is {top_k}. Expected 1 to {size * kept}.")
    if formula.score not in SCORES:
        raise InputError(f"No score is called '{formula.score}'. Expected one of {SCORES}.")
    if formula.score == "chosen" and correction is not None:
        raise InputError("A correction changes scores, and 'chosen' chooses by logits.")


def route(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], weights [T, k] and indices [T, k] int64, as the op `moepress::route`."""
    logits = _logits(hidden, weight, bias, formula)
    return logits, *choose(logits, correction, top_k, formula)


def choose(
    logits: Tensor, correction: Tensor | None, top_k: int, formula: Formula
) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and indices [T, k] int64 from logits [T, E]."""
    scores = scores_of(logits, formula)
    choice = choices(scores, correction, formula)
    # Stable: of equal choices the first.
    index = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = scores.gather(1, index)
    if formula.score == "chosen":
        weights = torch.softmax(weights.float(), -1).to(formula.score_dtype)
    if formula.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + formula.epsilon)
    if formula.scale != 1:
        weights = weights * formula.scale
    return weights.to(formula.weights_dtype), index


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, formula: Formula) -> Tensor:
    """Sums in float32 at least, rounded once."""
    dtype = formula.product_dtype
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if any(given != dtype for given in dtypes):
        wide = reduce(torch.promote_types, dtypes, torch.float32)
        hidden, weight = hidden.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    return F.linear(hidden, weight, bias).to(dtype).to(formula.logits_dtype)


def scores_of(logits: Tensor, formula: Formula) -> Tensor:
    """Scores [T, E] of logits [T, E]."""
    wide = logits.float()
    if formula.score == "chosen":
        return wide
    if formula.score == "softmax":
        return torch.softmax(wide, -1).to(formula.score_dtype)
    if formula.score == "sigmoid":
        return torch.sigmoid(wide).to(formula.score_dtype)
    return F.softplus(wide).to(formula.score_dtype).sqrt()


def choices(scores: Tensor, correction: Tensor | None, formula: Formula) -> Tensor:
    """Scores [T, E] as they count for the choice; those outside of a token's best groups -inf."""
    choice = scores if correction is None else scores + correction
    if formula.groups == 1:
        return choice
    grouped = torch.unflatten(choice, 1, (formula.groups, -1))  # a view may have no tokens
    best = min(formula.group_best, grouped.shape[-1])
    worth = grouped.topk(best, dim=-1).values.sum(-1)  # [T, groups]
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    left_out = torch.ones_like(worth, dtype=torch.bool)
    left_out.scatter_(1, order[:, : formula.kept_groups], False)
    return grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
