"""What was measured on the compressed model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moepress.evaluation.tables import evaluation_tables
from moepress.format.checkpoint import EVALUATION
from moepress.page.sections.section import Section, Table
from moepress.page.subject import Subject

# Excess of loops that is reported, in standard deviations: 5 % of equal models would have it.
LOOP_SIGMAS = 1.64
USUAL_BITS = "8"  # of activations


def evaluation(subject: Subject) -> Section:
    """Perplexity, KL, tasks, loops and speed; a warning if nothing was evaluated."""
    found = subject.evaluation
    if found is None:
        return Section(
            warnings=(
                "This model was not evaluated yet, so this page cannot say how good it is. Run "
                "`moepress evaluate FOLDER --against ORIGINAL --text FILE --out "
                f"FOLDER/{EVALUATION}`, then write the report again.",
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
    warnings = (*_pruning_warnings(found, subject), *_loop_warnings(found))
    return Section((*text, *_conditions(found)), warnings, tables=tables)


def _conditions(found: Mapping[str, Any]) -> tuple[str, ...]:
    """How the model was run, where not as it usually is."""
    text: tuple[str, ...] = ()
    bits = found["provenance"].get("activation_bits", USUAL_BITS)
    if bits != USUAL_BITS:
        text = (f"Activations were rounded to {bits} bits, usually to {USUAL_BITS}.",)
    if found["pruning"] is not None:
        text = (*text, f"{found['pruning']['share']:.1%} of the chosen experts were dropped.")
    return text


def _pruning_warnings(found: Mapping[str, Any], subject: Subject) -> tuple[str, ...]:
    """A warning if the model was measured with experts dropped and the folder drops none or
    others, or the other way round."""
    measured = found["pruning"] is not None
    drops = subject.pruning is not None and subject.pruning.drops
    if measured and subject.pruning is not None and drops:
        rule = subject.pruning.digest()
        if found["provenance"].get("pruning", rule) == rule:
            return ()
        state = "with another rule of dropping experts than this folder has"
    elif measured == drops:
        return ()
    elif measured:
        state = "with experts dropped, and this folder drops none"
    else:
        state = "without dropping experts, and this folder drops some"
    return (f"This was measured {state}: evaluate it again as it is, without `--prune`.",)


def _loop_warnings(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning if the model loops significantly more than the original.

    Without an evaluated original: if it loops more often than not.
    """
    mine, original = found["repetition"], found["original_repetition"]
    if mine is None:
        return ()
    loops = f"{mine['looping']} of {mine['generations']} greedy generations end in a loop"
    if original is None:
        often = mine["looping"] > mine["generations"] / 2
        return (
            (f"{loops}. Evaluate --against the original to see if it does so too.",)
            if often
            else ()
        )
    # Two shares of equally many generations: one-sided test at 5 %, normal approximation.
    pooled = (mine["looping"] + original["looping"]) / (2 * mine["generations"])
    noise = math.sqrt(2 * pooled * (1 - pooled) * mine["generations"])
    if mine["looping"] - original["looping"] <= LOOP_SIGMAS * noise:
        return ()
    return (
        f"{loops}, but only {original['looping']} of the original's. Perplexity does not show "
        "this: try a larger budget.",
    )
