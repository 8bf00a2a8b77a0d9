"""The sections of the report of a model.

`SECTIONS` is the page. To add something to it, write a function that makes a `Section` from a
`Subject`, and add a line to that table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moepress.page.sections.calibration import cost, coverage, routing
from moepress.page.sections.evaluation import evaluation
from moepress.page.sections.plan import bits, loss, recipe, sizes
from moepress.page.sections.pruning import pruning
from moepress.page.sections.section import Section as Section
from moepress.page.subject import Subject

# (id, heading, content) in the order of the page.
SECTIONS: tuple[tuple[str, str, Callable[[Subject], Section]], ...] = (
    ("bits", "Bits", bits),
    ("evaluation", "Evaluation", evaluation),
    ("coverage", "Calibration coverage", coverage),
    ("bytes", "Bytes", sizes),
    ("loss", "Loss against budget", loss),
    ("pruning", "Pruning", pruning),
    ("routing", "Routing", routing),
    ("cost", "Cost of each expert", cost),
    ("recipe", "Recipe and provenance", recipe),
)


def sections(subject: Subject) -> Iterator[tuple[str, str, Section]]:
    """(id, heading, content) of every section."""
    for key, heading, make in SECTIONS:
        yield key, heading, make(subject)
