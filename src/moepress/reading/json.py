"""JSON as RFC 8259 has it, and no more: what other readers would take differently is refused.

Python's own reader takes NaN, the last of several equal keys, numbers of any length and nesting
until its stack ends.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepress.errors import FileError, InputError
from moepress.reading.files import TEXT_LIMIT, read_text

MOST_DIGITS = 300  # of a number; below the 309 that a float has room for
MOST_NESTED = 64  # objects and arrays inside each other; files of transformers have about 10
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(
    path: str | Path, what: str, limit: int = TEXT_LIMIT, *, infinities: bool = False
) -> Any:
    """The value of a JSON file.

    Args:
        what: what the file is for the caller, such as "the plan"; begins the message.
        limit: the most bytes it may have.
        infinities: as of `parse_json`.

    Raises:
        FileError: it cannot be read (`read_text`), or is not JSON as `parse_json` says.
    """
    text = read_text(path, what, limit)
    try:
        return parse_json(text, infinities)
    except ValueError as error:
        raise FileError(
            f"{what} {path} cannot be read as JSON: {error}. It is damaged or was edited: restore "
            "it."
        ) from error


def read_object(
    path: str | Path, what: str, limit: int = TEXT_LIMIT, *, infinities: bool = False
) -> dict[str, Any]:
    """The fields of a JSON file that holds an object. Arguments and errors: as of `read_json`."""
    value = read_json(path, what, limit, infinities=infinities)
    if not isinstance(value, dict):
        raise FileError(
            f"{what} {path} holds {kind_of(value)}. Expected an object, {{...}}: restore the file."
        )
    return value


def parse_json(text: str, infinities: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        infinities: take Infinity, which old configs of transformers have, as the object that
            transformers writes for it since: {"__float__": "Infinity"}.

    Raises:
        InputError: it is not JSON, or has NaN or an infinity, a number of more than 300 digits or
            outside the range of a float, equal keys in an object, more than 64 nested objects and
            arrays, or a string that is no Unicode text. The message is one clause without a full
            stop, for the caller to say where.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_tagged if infinities else _no_constant,
            parse_int=_bounded(int),
            parse_float=_bounded(float),
            object_pairs_hook=_distinct,
        )
    except RecursionError as error:
        raise _too_nested() from error
    except json.JSONDecodeError as error:
        raise InputError(str(error)) from error
    _check_nesting(value)
    if _SURROGATE.search(text):
        _check_unicode(value)
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return "a string" if isinstance(value, str) else "a number"


def _no_constant(name: str) -> Any:
    raise InputError(f"{name} is no JSON. Expected a finite number")


def _tagged(name: str) -> Any:
    return _no_constant(name) if name == "NaN" else {"__float__": name}


def _bounded(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(digits: str) -> Any:
        if len(digits) > MOST_DIGITS:
            raise InputError(f"a number has {len(digits):,} digits. Expected at most {MOST_DIGITS}")
        value = kind(digits)
        if not math.isfinite(value):
            raise InputError(f"{digits} is too large. Expected a finite number")
        return value

    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"key {key[:80]!r} is there twice. Expected it once")
        found[key] = value
    return found


def _check_nesting(value: Any) -> None:
    """Raise InputError if objects and arrays are nested too deep. No recursion."""
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_nested()


def _too_nested() -> InputError:
    return InputError(
        f"objects and arrays are nested too deep. Expected at most {MOST_NESTED} inside each other"
    )


def _check_unicode(value: Any) -> None:
    """Raise InputError if a string, or a key, holds half of a surrogate pair."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"a string is no Unicode text: {one[error.start]!r} alone"
                ) from error
