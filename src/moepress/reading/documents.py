"""Documents of moepress: frozen types that check their fields, made from JSON that was read.

A `Document` takes each field in its own JSON type only ("3", 3.0 and true are no 3), and no unknown
field. Arrays become tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from moepress.errors import FileError, printable
from moepress.reading.json import kind_of

MOST_SHOWN = 60  # characters of a wrong value


class Document(BaseModel):
    """Base of documents: strict types, finite numbers, no unknown fields, immutable."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )


class OpenDocument(Document):
    """A document in which unknown fields are allowed and ignored: others may add their own."""

    model_config = ConfigDict(extra="ignore")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Array = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]  # a JSON array of T
Pair = Annotated[tuple[T, T], BeforeValidator(_as_tuple)]  # a JSON array of two T

D = TypeVar("D", bound=Document)


def parse(kind: type[D], fields: Any, where: str, do: str) -> D:
    """The document that has these fields.

    Args:
        where: names the file, or the part of it, in the message.
        do: what the user can do about it, a sentence.

    Raises:
        FileError: the fields are not those of the document. One line: which field, what it
            holds, what was expected.
    """
    if not isinstance(fields, Mapping):
        raise FileError(f"{where} is {kind_of(fields)}. Expected an object, {{...}}. {do}")
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise FileError(f"{where} {wrong_field(error)} {do}") from error


def parse_value(adapter: TypeAdapter[T], value: Any, where: str, do: str) -> T:
    """As `parse`, for a value of any type."""
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise FileError(f"{where} {wrong_field(error)} {do}") from error


def wrong_field(error: ValidationError, name: str = "") -> str:
    """The first wrong field, what it is, and what was expected, as the end of a sentence.

    Args:
        name: of the field that was validated; empty: a whole document was.
    """
    first, *others = error.errors(include_url=False)
    parts = (*([name] if name else []), *first["loc"])
    path = ".".join(printable(str(part))[:MOST_SHOWN] for part in parts)
    more = f" {len(others)} more are wrong." if others else ""
    if first["type"] == "missing":
        return f"has no field '{path}'. Expected one.{more}"
    if first["type"] == "extra_forbidden":
        return f"has an unknown field '{path}'. Expected only those of the format.{more}"
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"has {path or 'a value'} = {shown(first['input'])}. Expected: {message}.{more}"


def shown(value: Any) -> str:
    """A value for a message: one line without control characters, and short."""
    if isinstance(value, Mapping | list):
        return kind_of(value)
    try:
        text = printable(repr(value))
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."
