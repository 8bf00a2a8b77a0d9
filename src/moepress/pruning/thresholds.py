"""Below which ratio to the token's largest routing weight an expert is dropped, by layer and rank.

Thresholds are solved from stored `DropCosts`, in no time, for any strength. Rank 1 is never
dropped: its threshold is 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from moepress.costs.drop_costs import DropCosts
from moepress.errors import InputError

Floats = npt.NDArray[np.float64]


def medians(costs: DropCosts) -> Floats:
    """The paper's mu: the median of w_r / w_1 (arXiv:2410.06270, section 3.3), for every rank r.

    Returns:
        [L, k].
    """
    half = np.full(costs.ratio.shape[:2], 0.5)
    return _with_first(quantile(costs, half))


def cheapest(costs: DropCosts, share: float, renormalise: bool) -> tuple[Floats, float]:
    """Drop a share of all choices of experts where it costs least.

    Choices are dropped from the smallest ratio up. Their costs are first made to rise with the
    ratio (isotonic regression, which pools bins where they fall); then the cheapest bins of all
    layers and ranks are taken until the share is reached. Wherever that does not end inside a pool,
    no other thresholds have a smaller sum.

    Costs are of a rank dropped with all behind it, so a threshold is lowered to those of the ranks
    behind where it lies above them: a token then loses its last choices, never one before them. The
    share that is dropped comes out smaller by that little.

    Args:
        share: of all T * k choices of every layer, 0 .. 1 - 1 / k.
        renormalise: whether the weights that stay are scaled up.

    Returns:
        Thresholds [L, k], and the predicted cost: squared error that a token meets, over the energy
        of the residual stream, summed over layers.

    Raises:
        InputError: the share is out of range.
    """
    check_share(costs, share)
    measured = costs.costs(renormalise)  # [L, k - 1, Q]
    layers, _, bins = measured.shape
    rising = np.array([isotonic_regression(row).x for row in measured.reshape(-1, bins)])
    wanted = share * layers * costs.top_k * bins  # bins, of T / Q choices each
    order = np.argsort(rising, axis=None, kind="stable")
    taken = np.empty_like(measured)
    taken.flat[order] = np.clip(wanted - np.arange(measured.size), 0, 1)  # of the last one, a part
    ratios = quantile(costs, taken.sum(axis=-1) / bins)
    thresholds = _with_first(np.minimum.accumulate(ratios[:, ::-1], axis=1)[:, ::-1])
    return thresholds, float((taken * measured).sum() / bins)


def quantile(costs: DropCosts, share: Floats) -> Floats:
    """The ratio below which a share [L, k - 1] of the tokens lies, of each layer and rank."""
    bins = costs.ratio.shape[-1] - 1
    place = np.clip(share, 0, 1) * bins
    below = np.minimum(place.astype(np.int64), bins - 1)[..., None]
    low, high = (
        np.take_along_axis(costs.ratio, i, axis=-1)[..., 0].astype(np.float64)
        for i in (below, below + 1)
    )
    inside = low + (place - below[..., 0]) * (high - low)
    return np.where(share <= 0, 0.0, inside)


def check_share(costs: DropCosts, share: float) -> None:
    """Raise InputError if that share of choices cannot be dropped."""
    if not 0 <= share <= costs.largest_share:
        raise InputError(
            f"Cannot drop {share:.3g} of the chosen experts: each token chooses {costs.top_k} and "
            f"keeps its first. Give a share from 0 to {costs.largest_share:.3g}, or 'paper'."
        )


def _with_first(thresholds: Floats) -> Floats:
    """[L, k - 1] to [L, k]: the first rank is never dropped."""
    return np.pad(thresholds, ((0, 0), (1, 0)))
