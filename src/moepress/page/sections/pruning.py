"""What dropping experts while the model runs would cost, and what this folder drops."""

from __future__ import annotations

import numpy as np

from moepress.page.curves import drop_curve
from moepress.page.sections.section import Section, Table, counted
from moepress.page.subject import Subject
from moepress.pruning.thresholds import cheapest, medians, reachable_share

STEPS = 16  # shares at which the curve is computed


def pruning(subject: Subject) -> Section:
    """Cost against the dropped share, and the paper's thresholds."""
    costs = subject.drop_costs
    if costs is None:
        return Section(("The cost of dropping experts was not measured.",))
    most = reachable_share(costs)
    if most == 0:
        return Section(("No expert can be dropped: every token keeps its first choice.",))
    shares = np.linspace(0, most, STEPS).tolist()
    ways = {
        name: [(share, cheapest(costs, share, renormalise)[1]) for share in shares]
        for name, renormalise in (("weights as they are", False), ("weights scaled up", True))
    }
    state = (
        "This folder drops none: `moepress prune FOLDER 0.15` makes it drop 15 % of all choices."
    )
    if subject.pruning is not None:
        layers = sum(map(any, subject.pruning.thresholds.values()))
        state = (
            f"This folder drops experts in {counted(layers, 'layer')}, and protects "
            f"{subject.pruning.protect:.1%} of a prompt's tokens."
        )
    rows = tuple(
        (layer, *(round(float(ratio), 4) for ratio in row[1:]))
        for layer, row in zip(costs.layers, medians(costs), strict=True)
    )
    head = ("layer", *(f"rank {rank}" for rank in range(2, costs.top_k + 1)))
    return Section(
        (
            f"Each token chooses {costs.top_k} experts. Pruning drops its weaker choices while the "
            f"model runs. {state}",
            "Cost is the mean squared error of the MoE block's output over the energy of the "
            "residual stream, summed over layers, with the best thresholds for each share. At most "
            f"{most:.1%} of all choices can be dropped.",
            "The table has, by layer, the median of a rank's routing weight over the token's "
            "largest one. These are the Mixture Compressor's thresholds, "
            "`moepress prune FOLDER paper`.",
        ),
        pictures=(drop_curve(ways),),
        tables=(Table(head, rows),),
    )
