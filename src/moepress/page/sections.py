"""What the report of a model says, section by section.

`SECTIONS` is the page: to add something to it, write a function that makes a `Section` of a
`Subject`, and a line in that table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moepress.allocation.choices import offered
from moepress.allocation.plan import PROJECTIONS, BitAllocation
from moepress.cli.tables import evaluation_tables
from moepress.costs.scores import BOTH
from moepress.format.checkpoint import EVALUATION
from moepress.format.codec import LEFT_OUT
from moepress.original.sizes import byte_unit
from moepress.page.curves import drop_curve, loss_curve, part_bars
from moepress.page.maps import bit_map, heat_map
from moepress.page.picture import Picture
from moepress.page.subject import NUDGE, Subject
from moepress.pruning.thresholds import cheapest, medians
from moepress.recipe import Recipe

STEPS = 16  # shares at which the curve of skipping experts is computed
LOOP_SIGMAS = 1.64  # by how much more must loop to be told: 5 % of equal models would be
LISTED = 16  # experts named in the list of those that few tokens chose


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of the page: sentences, then pictures, then tables."""

    text: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


def _bits(subject: Subject) -> Section:
    plan = subject.plan
    widths = plan.recipe.expert_bits
    rows = tuple(
        (
            f"{name}_proj",
            *(int((plan.bits[:, :, column] == b).sum()) for b in widths),
            float(plan.bits[:, :, column].mean()),
        )
        for column, name in enumerate(PROJECTIONS)
    )
    named = (f"{bits}-bit experts" if bits != LEFT_OUT else "left out" for bits in widths)
    head = ("projection", *named, "mean bits")
    return Section(
        ("Each square is one expert of one layer; the darker, the more bits its weights have.",),
        _left_out(subject),
        pictures=(bit_map(plan),),
        tables=(Table(head, rows), *_other_widths(plan)),
    )


def _left_out(subject: Subject) -> tuple[str, ...]:
    """What experts of 0 bits mean for the model's use."""
    left_out = subject.plan.bits[..., 0] == LEFT_OUT
    if not left_out.any():
        return ()
    unseen = ""
    if subject.scores is not None:
        count = (left_out & (subject.scores.tokens == 0)).sum()
        unseen = f" {count:,} of them no calibration token chose: what they are for is unknown."
    return (
        f"{left_out.sum():,} of {left_out.size:,} experts are left out: a token that chooses one "
        f"gets nothing from it.{unseen}",
    )


def _other_widths(plan: BitAllocation) -> tuple[Table, ...]:
    """How many of each kind of the other tensors have each width; nothing if all are fixed."""
    if not plan.linear_bits:
        return ()
    kinds: dict[str, Counter[int]] = {}
    for name, bits in plan.linear_bits.items():
        kinds.setdefault(name.split(".")[-2], Counter())[bits] += 1
    widths = sorted(set(plan.linear_bits.values()))
    rows = tuple((kind, *(counts[b] for b in widths)) for kind, counts in kinds.items())
    return (Table(("other tensors", *(f"{bits}-bit" for bits in widths)), rows),)


def _coverage(subject: Subject) -> Section:
    scores = subject.scores
    if scores is None:
        return _no_scores()
    floor, tokens = subject.plan.recipe.token_floor, scores.tokens
    few, never = int((tokens < floor).sum()), int((tokens == 0).sum())
    text: tuple[str, ...] = (
        f"{scores.total_tokens:,} calibration tokens. An expert was chosen by {tokens.min():,} to "
        f"{tokens.max():,} of them, by {int(np.median(tokens)):,} in the median.",
    )
    if not few:
        return Section((*text, f"Every expert was chosen by at least {floor:,} tokens."))
    warnings = (
        f"{few:,} of {tokens.size:,} experts were chosen by fewer than {floor:,} calibration "
        f"tokens, {never:,} of them by none: their scores say little, and their rounding, if any, "
        "borrowed tokens of other experts. Calibrate on more text, or on text closer to the "
        "model's use.",
    )
    order = np.argsort(tokens, axis=None, kind="stable")[: min(few, LISTED)]
    places = [np.unravel_index(flat, tokens.shape) for flat in order]
    rows = tuple(
        (
            scores.layers[row],
            int(e),
            int(tokens[row, e]),
            *(int(bits) for bits in subject.plan.bits[row, e]),
        )
        for row, e in places
    )
    if few > LISTED:
        text = (*text, f"The {LISTED} experts with the fewest tokens:")
    head = ("layer", "expert", "tokens", *(f"{name}_proj bits" for name in PROJECTIONS))
    return Section(text, warnings, tables=(Table(head, rows),))


def _evaluation(subject: Subject) -> Section:
    found = subject.evaluation
    if found is None:
        return Section(
            warnings=(
                "This model was not evaluated yet: nothing here says how good it is. Run "
                "`moepress evaluate FOLDER --against ORIGINAL --text FILE --out "
                f"FOLDER/{EVALUATION}`.",
            )
        )
    tables = tuple(
        Table(tuple(head), tuple(map(tuple, rows)))
        for head, rows in evaluation_tables(found)[:-1]  # bytes by part have their own section
    )
    text: tuple[str, ...] = (f"Model {found['model']}, windows of {found['length']} tokens.",)
    if found.get("ratio") is not None:
        text = (
            *text,
            f"Against {found['original']}: perplexity x {found['ratio']:.4f} (geometric mean over "
            f"texts), KL divergence {found['kl']:.4f} nats per token.",
        )
    return Section(text, _loop_warnings(found), tables=tables)


def _loop_warnings(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say where the model gets stuck more than chance explains, or more often than not."""
    mine, original = found["repetition"], found["original_repetition"]
    if mine is None:
        return ()
    told = f"{mine['looping']} of {mine['generations']} greedy generations end in a loop"
    if original is None:
        stuck = mine["looping"] > mine["generations"] / 2
        return (f"{told}. Evaluate --against the original to see if it does too.",) if stuck else ()
    # Two shares of as many generations each: one-sided test at 5 %, by the normal approximation.
    pooled = (mine["looping"] + original["looping"]) / (2 * mine["generations"])
    noise = math.sqrt(2 * pooled * (1 - pooled) * mine["generations"])
    if mine["looping"] - original["looping"] <= LOOP_SIGMAS * noise:
        return ()
    return (
        f"{told}, {original['looping']} of the original's. Perplexity does not show that: try a "
        "larger budget.",
    )


def _loss(subject: Subject) -> Section:
    if subject.scores is None:
        return _no_scores()
    plan = subject.plan
    texts = []
    for step, word in ((NUDGE, "more"), (-NUDGE, "less")):
        wanted = plan.average_bits + step
        near = [p for p in subject.frontier if math.isclose(p.average_bits, wanted, abs_tol=0.02)]
        if not near or plan.predicted_loss <= 0:
            continue
        best = min(near, key=lambda p: abs(p.average_bits - wanted))
        change = best.predicted_loss / plan.predicted_loss - 1
        size = best.folder_bytes - plan.folder_bytes
        unit, name = byte_unit(abs(size))
        texts.append(
            f"{NUDGE} bits {word} per expert weight: {size / unit:+.3g} {name}, predicted loss "
            f"{change:+.1%}."
        )
    about = (
        "The least loss that the scores predict for each budget. Predicted loss orders plans of "
        "one model; it is no perplexity."
    )
    return Section((about, *texts), pictures=(loss_curve(subject.frontier, plan),))


def _bytes(subject: Subject) -> Section:
    if subject.parts is None:
        return Section(("The sizes of the model's parts are not known.",))
    parts = subject.parts
    rows = [
        (part, size.original, size.stored, size.original / size.stored)
        for part, size in parts.items()
    ]
    before, after = (sum(getattr(p, key) for p in parts.values()) for key in ("original", "stored"))
    rows.append(("all tensors", before, after, before / after))
    table = Table(("part", "original bytes", "stored bytes", "times smaller"), tuple(rows))
    return Section(pictures=(part_bars(parts),), tables=(table,))


def _pruning(subject: Subject) -> Section:
    costs = subject.drop_costs
    if costs is None or costs.top_k == 1:
        return Section(("What skipping experts would cost was not measured.",))
    shares = np.linspace(0, costs.largest_share, STEPS).tolist()
    ways = {
        name: [(share, cheapest(costs, share, renormalise)[1]) for share in shares]
        for name, renormalise in (("weights as they are", False), ("weights scaled up", True))
    }
    state = "This folder skips no experts: `moepress prune FOLDER 0.15` makes it."
    if subject.pruning is not None:
        layers = len(subject.pruning.thresholds)
        state = (
            f"This folder skips experts in {layers} layers, and protects "
            f"{subject.pruning.protect:.1%} of a prompt's tokens."
        )
    rows = tuple(
        (layer, *(round(float(ratio), 4) for ratio in row[1:]))
        for layer, row in zip(costs.layers, medians(costs), strict=True)
    )
    head = ("layer", *(f"rank {rank}" for rank in range(2, costs.top_k + 1)))
    return Section(
        (
            f"Each token chooses {costs.top_k} experts and can do without the weaker ones. {state}",
            "Cost: squared error of the MoE block's output that a token meets, over the energy of "
            "the residual stream, summed over layers, where thresholds are chosen best.",
            "Median of a rank's routing weight over the token's largest, by layer: the Mixture "
            "Compressor's threshold, `moepress prune FOLDER paper`.",
        ),
        pictures=(drop_curve(ways),),
        tables=(Table(head, rows),),
    )


def _routing(subject: Subject) -> Section:
    scores = subject.scores
    if scores is None:
        return _no_scores()
    chosen = scores.tokens > 0
    frequency = np.where(chosen, scores.tokens / scores.total_tokens, np.nan)
    weight = np.where(chosen, scores.routing_weight / scores.total_tokens, np.nan)
    cost = "\N{GREEK SMALL LETTER PHI}"
    return Section(
        (
            f"Frequency ({cost}) is the share of calibration tokens that choose an expert; routing "
            "weight (w) is its router's weight, averaged over all tokens.",
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


def _cost(subject: Subject) -> Section:
    scores = subject.scores
    if scores is None:
        return _no_scores()
    widths = np.array(offered(subject.plan.recipe))
    distance = np.abs(widths - subject.plan.average_bits)
    column = int(np.where(widths == LEFT_OUT, np.inf, distance).argmin())
    known = (scores.tokens > 0)[:, :, None]
    maps = np.where(known, subject.costs[..., column], np.nan)
    names = {f"{name}_proj": part for part, name in enumerate(PROJECTIONS)}
    if not subject.plan.recipe.per_projection:
        names = {"whole expert": BOTH}
    same = {f"{n} at {widths[column]} bits": maps[:, :, part] for n, part in names.items()}
    paid = {"both projections, as they are": np.where(known[..., 0], subject.paid, np.nan)}
    return Section(
        (
            f"Above: what every expert would cost at {widths[column]} bits, which is what the "
            "allocation weighs. Below: what each costs at the bits it got; together they are "
            f"{subject.paid.sum():.4g} of the predicted loss, {subject.plan.predicted_loss:.4g}. "
            + _unit(subject.plan.recipe),
        ),
        pictures=(
            heat_map(
                "cost",
                f"Cost of every expert at {widths[column]} bits",
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
    """What a predicted loss is."""
    if recipe.cost == "paper":
        return "It has no unit (arXiv:2410.06270, eq. 4)."
    if recipe.sensitivity == "none":
        return "It is squared error over the energy of the residual stream."
    return (
        "It is KL to the original in nats per token, to second order; what is measured is larger."
    )


def _recipe(subject: Subject) -> Section:
    default, rows = Recipe().to_dict(), []
    for name, value in subject.plan.recipe.to_dict().items():
        if value is not None or default[name] is not None:
            rows.append(
                (name, _plain(value), "" if value == default[name] else _plain(default[name]))
            )
    made = tuple((name, value) for name, value in sorted(subject.plan.provenance.items()))
    return Section(
        tables=(
            Table(("recipe", "value", "default, if another"), tuple(rows)),
            Table(("provenance", ""), made),
        )
    )


SECTIONS: tuple[tuple[str, str, Callable[[Subject], Section]], ...] = (
    ("bits", "Bits", _bits),
    ("evaluation", "Evaluation", _evaluation),
    ("coverage", "Coverage", _coverage),
    ("bytes", "Bytes", _bytes),
    ("loss", "Loss against budget", _loss),
    ("pruning", "Skipping experts", _pruning),
    ("routing", "Routing", _routing),
    ("cost", "Cost", _cost),
    ("recipe", "Recipe and provenance", _recipe),
)


def sections(subject: Subject) -> Iterator[tuple[str, str, Section]]:
    """(id, heading, content) of every section."""
    for key, heading, make in SECTIONS:
        yield key, heading, make(subject)


def _plain(value: Any) -> str:
    """A recipe's value as one would write it."""
    if isinstance(value, list | tuple):
        parts = ["=".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value]
        return ", ".join(parts) or "none"
    return "none" if value is None else str(value)


def _no_scores() -> Section:
    return Section(
        ("This folder was made from a plan, without the scores: give them with --scores FILE.",)
    )
