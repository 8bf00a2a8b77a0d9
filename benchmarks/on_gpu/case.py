"""A named measurement and its result, as lines of JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
BACKEND = "the cuda backend runs here"  # a case: without it nothing else is of use


@dataclass(frozen=True)
class Case:
    """One step of a part. `run` returns rows of results; it raises if the step fails."""

    name: str
    run: Callable[[], list[Row]]
    seconds: float = 60  # after that many, the process is killed and the next case begins


class CheckError(Exception):
    """A result differs from what it should be."""
