"""What a section of the report consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moepress.page.picture import Picture


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Section:
    """Content of a section: warnings, sentences, pictures, then tables."""

    text: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


def counted(number: float, noun: str) -> str:
    """A number of things, such as "1 layer" and "2 layers"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def no_scores() -> Section:
    """The section in place of one that needs scores."""
    return Section(
        (
            "This section needs the scores that the plan was made from, and this folder has none: "
            "give them with --scores FILE.",
        )
    )
