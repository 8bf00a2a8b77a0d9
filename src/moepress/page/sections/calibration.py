"""What was measured on the calibration set: coverage and routing of experts, and their costs."""

from __future__ import annotations

import numpy as np

from moepress.allocation.choices import offered
from moepress.allocation.plan import PROJECTIONS
from moepress.costs.scores import BOTH
from moepress.format.codec import LEFT_OUT, width
from moepress.page.maps import heat_map
from moepress.page.sections.section import Section, Table, counted, no_scores
from moepress.page.subject import Subject
from moepress.recipe import Recipe

LISTED = 16  # length of the list of experts with few tokens


def coverage(subject: Subject) -> Section:
    """How many calibration tokens chose each expert; a warning where there were few."""
    scores = subject.scores
    if scores is None:
        return no_scores()
    floor, tokens = subject.plan.recipe.token_floor, scores.reached
    few, never = int((tokens < floor).sum()), int((tokens == 0).sum())
    total, scored = scores.all_tokens, scores.total_tokens
    measured = about = of_scored = ""
    if scored < total:
        measured = f" Costs were measured on {scored:,} of them."
        about, of_scored = "about ", " of the scored ones"
    text: tuple[str, ...] = (
        f"{total:,} calibration tokens.{measured} An expert was chosen by {about}{tokens.min():,} "
        f"to {tokens.max():,} of them, by {int(np.median(tokens)):,} in the median.",
    )
    if not few:
        return Section((*text, f"Every expert was chosen by at least {floor:,} tokens."))
    warnings = (
        f"Experts chosen by fewer than {floor:,} calibration tokens: {few:,} of {tokens.size:,}, "
        f"{never:,} of them by none{of_scored}. Their scores are unreliable, and their rounding, "
        "if any, also used tokens of other experts. Calibrate on more text, or on text closer to "
        "the model's use.",
    )
    order = np.argsort(tokens, axis=None, kind="stable")[: min(few, LISTED)]
    places = [np.unravel_index(flat, tokens.shape) for flat in order]
    rows = tuple(
        (
            scores.layers[row],
            int(e),
            int(tokens[row, e]),
            *(width(bits) for bits in subject.plan.bits[row, e]),
        )
        for row, e in places
    )
    if few > LISTED:
        text = (*text, f"The {LISTED} experts with the fewest tokens:")
    head = ("layer", "expert", "tokens", *(f"{name}_proj bits" for name in PROJECTIONS))
    return Section(text, warnings, tables=(Table(head, rows),))


def routing(subject: Subject) -> Section:
    """How often, and with what weight, each expert is chosen."""
    scores = subject.scores
    if scores is None:
        return no_scores()
    chosen = scores.tokens > 0
    frequency = np.where(chosen, scores.frequency, np.nan)
    weight = np.where(chosen, scores.mean_weight, np.nan)
    phi = "\N{GREEK SMALL LETTER PHI}"
    return Section(
        (
            f"Frequency ({phi}) is the share of scored tokens that choose an expert. Routing "
            "weight (w) is the weight that the router gives the expert, averaged over all tokens.",
        ),
        pictures=(
            heat_map(
                "frequency",
                "How often each expert is chosen",
                {"frequency": frequency},
                scores.layers,
                "share of tokens",
            ),
            heat_map(
                "routing-weight",
                "Routing weight of each expert",
                {"routing weight": weight},
                scores.layers,
                "mean routing weight",
            ),
        ),
    )


def cost(subject: Subject) -> Section:
    """What each expert adds to the predicted loss, all at one width and at the widths they have."""
    scores = subject.scores
    if scores is None:
        return no_scores()
    widths = np.array(offered(subject.plan.recipe))
    distance = np.abs(widths - subject.plan.average_bits)
    option = int(np.where(widths == LEFT_OUT, np.inf, distance).argmin())
    chosen = (scores.tokens > 0)[:, :, None]
    maps = np.where(chosen, subject.costs[..., option], np.nan)
    names = {f"{name}_proj": rounded for rounded, name in enumerate(PROJECTIONS)}
    if not subject.plan.recipe.per_projection:
        names = {"whole expert": BOTH}
    bits = counted(width(widths[option]), "bit")
    same = {f"{n} at {bits}": maps[:, :, rounded] for n, rounded in names.items()}
    paid = {"both projections, as they are": np.where(chosen[..., 0], subject.paid, np.nan)}
    return Section(
        (
            f"First, the cost of every expert at {bits}: the allocation compares "
            "experts by such costs. Then, the cost of every expert at the bits it has. Their sum "
            f"is {subject.paid.sum():.4g} of the predicted loss, {subject.plan.predicted_loss:.4g}."
            f" {_unit(subject.plan.recipe)}",
        ),
        pictures=(
            heat_map(
                "cost",
                f"Cost of every expert at {bits}",
                same,
                scores.layers,
                "predicted loss",
            ),
            heat_map(
                "cost-paid",
                "Cost of every expert at its bits",
                paid,
                scores.layers,
                "predicted loss",
            ),
        ),
    )


def _unit(recipe: Recipe) -> str:
    """The unit of a predicted loss, as a sentence."""
    if recipe.cost == "paper":
        return "Predicted loss has no unit (arXiv:2410.06270, eq. 4)."
    if recipe.sensitivity == "none":
        return "Predicted loss is squared error over the energy of the residual stream."
    return (
        "Predicted loss is the KL divergence from the original in nats per token, to second order; "
        "the measured divergence is larger."
    )
