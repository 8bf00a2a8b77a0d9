"""Fields of other types than a document's are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from moepress.errors import FileError
from moepress.reading.documents import Array, Document, OpenDocument, Pair, parse


class Inner(OpenDocument):
    name: str


class Example(Document):
    count: int = Field(ge=1)
    rate: float = 0.5
    shape: Pair[int] = (1, 2)
    widths: Array[int] = ()
    inner: Inner | None = None


def read(fields: Any) -> Example:
    return parse(Example, fields, "plan.json", "Restore it.")


def test_good_fields() -> None:
    one = read(
        {"count": 3, "rate": 2, "shape": [3, 4], "widths": [1, 2], "inner": {"name": "a", "x": 1}}
    )
    assert (one.count, one.rate, one.shape, one.widths) == (3, 2.0, (3, 4), (1, 2))
    assert one.inner == Inner(name="a")
    with pytest.raises(ValueError, match="frozen"):
        one.count = 4  # type: ignore[misc]


WRONG: list[tuple[Any, str]] = [
    ([], "plan.json is an array. Expected an object"),
    ({}, "has no field 'count'"),
    ({"count": 3, "cuont": 4}, "has an unknown field 'cuont'"),
    ({"count": 4.5}, "count = 4.5. Expected: a valid integer"),
    ({"count": 4.0}, "count = 4.0"),
    ({"count": True}, "count = True"),
    ({"count": "3"}, "count = '3'"),
    ({"count": 0}, "count = 0. Expected: greater than or equal to 1"),
    ({"count": None}, "count = None"),
    ({"count": 3, "rate": float("nan")}, "rate = nan. Expected: a finite number"),
    ({"count": 3, "rate": "0.5"}, "rate = '0.5'"),
    ({"count": 3, "shape": [1]}, "has no field 'shape.1'"),
    ({"count": 3, "shape": [1, 2, 3]}, "shape"),
    ({"count": 3, "widths": "12"}, "widths = '12'"),
    ({"count": 3, "widths": [1, None]}, "widths.1 = None"),
    ({"count": 3, "inner": {"name": 1}}, "inner.name = 1"),
    ({"count": "\x1b" + "x" * 5000}, "\\x1bxxx"),
]


@pytest.mark.parametrize(("fields", "expected"), WRONG, ids=range(len(WRONG)))
def test_wrong_fields_are_one_line(fields: Any, expected: str) -> None:
    with pytest.raises(FileError) as caught:
        read(fields)
    message = str(caught.value)
    assert (
        expected in message
        and message.startswith("plan.json ")
        and message.endswith(" Restore it.")
    )
    assert "\n" not in message and "\x1b" not in message and len(message) < 300
