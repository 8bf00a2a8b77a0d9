"""Thresholds for w_r / w_1, a routing weight over the token's largest one, by layer and rank.

An expert is dropped where the ratio is below its threshold. Thresholds for any strength are solved
from stored `DropCosts` in negligible time. Rank 1 is never dropped: its threshold is 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from moepress.costs.drop_costs import NO_EXPERT, DropCosts
from moepress.errors import InputError

Floats = npt.NDArray[np.float64]


def medians(costs: DropCosts) -> Floats:
    """The paper's mu: the median of w_r / w_1 for every rank r (arXiv:2410.06270, section 3.3).

    Choices of no expert are not counted. How many there are is known to half a bin.

    Returns:
        [L, k], 0 for the first rank, and for ranks without a choice.
    """
    bins = costs.ratio.shape[-1] - 1
    edges = (costs.ratio < NO_EXPERT).sum(-1)  # of choices of experts
    real = np.clip((edges - 0.5) / bins, 0, None)
    real = np.where(edges > bins, 1, real)
    return _with_first(np.minimum(quantile(costs, real / 2), 1))


def cheapest(costs: DropCosts, share: float, renormalise: bool) -> tuple[Floats, float]:
    """Thresholds that drop a share of all choices of experts where it costs least.

    A threshold drops choices from the smallest ratio up. Isotonic regression first makes the costs
    rise with the ratio: it pools bins whose costs fall. Then the cheapest bins of all layers and
    ranks are taken until the share is reached. Where that does not end inside a pool, no other
    thresholds have a smaller sum of costs.

    The cost of a rank is measured with all later ranks dropped. A threshold is therefore
    lowered to the smallest one of the later ranks: a token then loses its last choices, never
    one before them. The dropped share comes out slightly smaller.

    Choices that tie with the token's first one (ratio 1) are never dropped, so their bins are not
    taken. If most choices tie, as those of phimoe do, or are of experts that are left out, the
    share is not reached: `reachable_share`.

    Args:
        share: of all T * k choices of every layer, 0 .. 1 - 1 / k.
        renormalise: whether kept weights are scaled up.

    Returns:
        Thresholds [L, k], and the predicted cost: mean squared error of a token over the energy of
        the residual stream, summed over layers.

    Raises:
        InputError: the share is out of range.
    """
    check_share(costs, share)
    measured = costs.costs(renormalise)  # [L, k - 1, Q]
    layers, _, bins = measured.shape
    wanted = share * layers * costs.top_k * bins  # in bins of T / Q choices
    taken = np.zeros_like(measured)
    rising, droppable = _rising(costs, measured)
    order = np.flatnonzero(droppable)[np.argsort(rising, kind="stable")]
    taken.flat[order] = np.clip(wanted - np.arange(len(order)), 0, 1)  # a fraction of the last
    ratios = quantile(costs, taken.sum(axis=-1) / bins)
    return _falling(costs, ratios), float((taken * measured).sum() / bins)


def cheapest_reads(
    costs: DropCosts, share: float, renormalise: bool, missing: float, relative_time: float
) -> tuple[Floats, Floats, float]:
    """Thresholds that save the most time per loss, where some choices need a read.

    As `cheapest`, with two thresholds for each layer and rank: of choices whose expert is in
    memory, and of those whose expert must be read. Bins of either are taken in the order of cost
    over the time that dropping a choice saves.

    Args:
        share: of all choices, 0 .. 1 - 1 / k.
        missing: share of the choices whose expert must be read.
        relative_time: time of a choice with a read, over that of one without.

    Returns:
        Thresholds [L, k] of choices in memory, and of those to be read, and the predicted cost as
        of `cheapest`.

    Raises:
        InputError: the share is out of range.
    """
    check_share(costs, share)
    measured = costs.costs(renormalise)
    layers, _, bins = measured.shape
    rising, droppable = _rising(costs, measured)
    places = np.flatnonzero(droppable)
    prices = np.concatenate([rising, rising / relative_time])
    amounts = np.repeat([1 - missing, missing], len(places))  # bins of each kind
    order = np.argsort(prices, kind="stable")
    left = share * layers * costs.top_k * bins - np.cumsum(amounts[order])
    some = np.clip(left + amounts[order], 0, amounts[order])  # a fraction of the last
    taken = np.zeros((2, measured.size))
    kind, place = np.divmod(order, max(len(places), 1))
    if len(places):
        taken[kind, places[place]] = np.divide(
            some, amounts[order], out=np.zeros_like(some), where=amounts[order] > 0
        )
    taken = taken.reshape(2, *measured.shape)
    here, away = (_falling(costs, quantile(costs, one.sum(axis=-1) / bins)) for one in taken)
    each = np.array([1 - missing, missing])[:, None, None, None]
    return here, away, float((taken * each * measured).sum() / bins)


def _rising(costs: DropCosts, measured: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Costs that rise with the ratio, and which of all bins, flattened, they are of.

    Bins of the ratio 1 and of choices of no expert are left out: they are never dropped.
    """
    bins = measured.shape[-1]
    droppable = (costs.ratio[..., :-1] < 1).ravel()
    rising = np.concatenate(
        [
            isotonic_regression(row[here]).x if here.any() else row[:0]
            for row, here in zip(
                measured.reshape(-1, bins), droppable.reshape(-1, bins), strict=True
            )
        ]
    )
    return rising, droppable


def _falling(costs: DropCosts, thresholds: Floats) -> Floats:
    """Thresholds [L, k], from those [L, k - 1] of all ranks but the first: each is lowered to the
    smallest of the later ranks that have choices to drop."""
    droppable = (costs.ratio[..., 0] < 1)[:, ::-1]
    later = np.where(droppable, thresholds[:, ::-1], np.inf)
    later = np.minimum.accumulate(later, axis=1)[:, ::-1]
    return _with_first(np.minimum(thresholds, later))


def quantile(costs: DropCosts, share: Floats) -> Floats:
    """Quantiles of w_r / w_1: the ratio below which a share of the tokens lies.

    Args:
        share: [L, k - 1], of each layer and rank but the first.

    Returns:
        [L, k - 1], linear between the edges of the bins; 0 for a share of 0.
    """
    bins = costs.ratio.shape[-1] - 1
    place = np.clip(share, 0, 1) * bins
    below = np.minimum(place.astype(np.int64), bins - 1)[..., None]
    low, high = (
        np.take_along_axis(costs.ratio, i, axis=-1)[..., 0].astype(np.float64)
        for i in (below, below + 1)
    )
    inside = low + (place - below[..., 0]) * (high - low)
    return np.where(share <= 0, 0.0, inside)


def dropped_share(costs: DropCosts, thresholds: Floats) -> float:
    """Share of all choices whose ratio lies below its threshold.

    Equal ratios are dropped together or not at all, and 1 is the largest threshold.

    Args:
        thresholds: [L, k].
    """
    bins = costs.ratio.shape[-1] - 1
    below = [
        np.interp(np.nextafter(threshold, -np.inf), edges, np.arange(bins + 1)) / bins
        if threshold > edges[0]
        else 0.0
        for row, ratios in zip(np.minimum(thresholds[:, 1:], 1), costs.ratio, strict=True)
        for threshold, edges in zip(row, ratios.astype(np.float64), strict=True)
    ]
    return float(np.sum(below)) / (len(costs.layers) * costs.top_k)


def reachable_share(costs: DropCosts) -> float:
    """The largest share of all choices that thresholds can drop.

    Less than `largest_share` where experts are left out, and where choices tie with the first.
    """
    all_below_one = np.ones((len(costs.layers), costs.top_k))
    return min(costs.largest_share, dropped_share(costs, all_below_one))


def check_share(costs: DropCosts, share: float) -> None:
    """Raise InputError if that share of choices cannot be dropped."""
    if not 0 <= share <= costs.largest_share:
        raise InputError(
            f"Cannot drop {share:.3g} of the chosen experts: each token chooses {costs.top_k} and "
            f"keeps its first. Give a share from 0 to {costs.largest_share:.3g}, or 'paper'."
        )


def _with_first(thresholds: Floats) -> Floats:
    """[L, k - 1] to [L, k]: 0 for the first rank, which is never dropped."""
    return np.pad(thresholds, ((0, 0), (1, 0)))
