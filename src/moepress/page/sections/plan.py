"""What was decided: widths, bytes, the loss that the scores predict, and the recipe."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from moepress.allocation.plan import PROJECTIONS, BitAllocation
from moepress.byte_units import byte_unit
from moepress.format.codec import LEFT_OUT
from moepress.page.curves import loss_curve, part_bars
from moepress.page.maps import bit_map
from moepress.page.sections.section import Section, Table, no_scores
from moepress.page.subject import NUDGE, Subject
from moepress.recipe import Recipe


def bits(subject: Subject) -> Section:
    """Code bits of experts and other tensors."""
    plan = subject.plan
    widths = plan.recipe.expert_bits
    rows = tuple(
        (
            f"{name}_proj",
            *(int((plan.bits[:, :, projection] == b).sum()) for b in widths),
            float(plan.bits[:, :, projection].mean()),
        )
        for projection, name in enumerate(PROJECTIONS)
    )
    named = (f"{bits}-bit experts" if bits != LEFT_OUT else "left out" for bits in widths)
    head = ("projection", *named, "mean bits")
    return Section(
        ("Each square is one expert of one layer; the darker, the more bits its codes have.",),
        _left_out(subject),
        pictures=(bit_map(plan),),
        tables=(Table(head, rows), *_other_widths(plan)),
    )


def _left_out(subject: Subject) -> tuple[str, ...]:
    """A warning where experts are left out."""
    left_out = subject.plan.bits[..., 0] == LEFT_OUT
    if not left_out.any():
        return ()
    unseen = ""
    if subject.scores is not None:
        count = (left_out & (subject.scores.tokens == 0)).sum()
        if count:
            unseen = f" No scored token chose {count:,} of them: what they are for is unknown."
    number = left_out.sum()
    are = "is" if number == 1 else "are"
    return (
        f"{number:,} of {left_out.size:,} experts {are} left out: a token that chooses one gets "
        f"nothing from it.{unseen}",
    )


def _other_widths(plan: BitAllocation) -> tuple[Table, ...]:
    """How many other tensors of each kind have each width; no table if all are fixed."""
    if not plan.linear_bits:
        return ()
    kinds: dict[str, Counter[int]] = {}
    for name, width in plan.linear_bits.items():
        kinds.setdefault(name.split(".")[-2], Counter())[width] += 1
    widths = sorted(set(plan.linear_bits.values()))
    rows = tuple((kind, *(counts[b] for b in widths)) for kind, counts in kinds.items())
    return (Table(("other tensors", *(f"{width}-bit" for width in widths)), rows),)


def sizes(subject: Subject) -> Section:
    """Bytes of each part of the model, before and after."""
    if subject.parts is None:
        return Section(("The sizes of the model's parts are not available.",))
    parts = subject.parts
    rows = [
        (part, size.original, size.stored, size.original / size.stored)
        for part, size in parts.items()
    ]
    before, after = (sum(getattr(p, key) for p in parts.values()) for key in ("original", "stored"))
    rows.append(("all tensors", before, after, before / after))
    table = Table(("part", "original bytes", "stored bytes", "times smaller"), tuple(rows))
    return Section(pictures=(part_bars(parts),), tables=(table,))


def loss(subject: Subject) -> Section:
    """Predicted loss of other budgets."""
    if subject.scores is None:
        return no_scores()
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
        "The curve is the lowest loss that the scores predict for each budget. Predicted loss "
        "compares plans of one model; it is not perplexity."
    )
    return Section((about, *texts), pictures=(loss_curve(subject.frontier, plan),))


def recipe(subject: Subject) -> Section:
    """Every setting of the recipe, and what the plan was made from."""
    default, rows = Recipe().to_dict(), []
    for name, value in subject.plan.recipe.to_dict().items():
        if value is not None or default[name] is not None:
            rows.append(
                (name, _plain(value), "" if value == default[name] else _plain(default[name]))
            )
    made = tuple((name, value) for name, value in sorted(subject.plan.provenance.items()))
    return Section(
        tables=(
            Table(("recipe", "value", "default, if different"), tuple(rows)),
            Table(("provenance", ""), made),
        )
    )


def _plain(value: Any) -> str:
    """A value of the recipe as text: lists with commas, pairs as name=weight."""
    if isinstance(value, list | tuple):
        items = ["=".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value]
        return ", ".join(items) or "none"
    return "none" if value is None else str(value)
