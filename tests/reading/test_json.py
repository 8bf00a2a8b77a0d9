"""JSON that others would read differently, or that takes their readers down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moepress.errors import FileError, InputError
from moepress.reading.json import MOST_DIGITS, MOST_NESTED, parse_json, read_json, read_object

WRONG = {
    "": "Expecting value",
    '{"a": 1': "delimiter",
    '{"a": NaN}': "NaN is no JSON",
    "[-Infinity]": "-Infinity is no JSON",
    "1e999": "too large",
    '{"a": 1, "b": 2, "a": 3}': "key 'a' is there twice",
    "9" * 5000: "5,000 digits",
    "0." + "9" * 5000: "5,002 digits",
    "[" * 10_000: "nested too deep",
    "[" * 100 + "]" * 100: "nested too deep",
    '{"a":' * (MOST_NESTED + 1) + "1" + "}" * (MOST_NESTED + 1): "nested too deep",
    r'["\ud800"]': "no Unicode text",
    r'{"\udfff": 1}': "no Unicode text",
    '{"a": "\n"}': "control character",
    "\ufeff{}": "BOM",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_wrong_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=WRONG[text]) as caught:
        read_json(path, "The plan")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_good_json_is_what_python_reads() -> None:
    for text in (
        '{"a": [1, -2.5e3, "é", null, true], "b": {}}',
        "[" * MOST_NESTED + "]" * MOST_NESTED,
        "9" * MOST_DIGITS,
        r'"\ud83d\ude00"',
    ):
        assert parse_json(text) == json.loads(text)


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, kind in (("[]", "an array"), ("null", "null"), ("3", "a number"), ('""', "a string")):
        path.write_text(text)
        with pytest.raises(FileError, match=f"holds {kind}"):
            read_object(path, "The plan")
    path.write_text('{"a": 1}')
    assert read_object(path, "The plan") == {"a": 1}


def test_infinities_of_old_configs_become_what_transformers_writes() -> None:
    text = '{"limit": [0.0, Infinity, -Infinity]}'
    tagged = [0.0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}]
    assert parse_json(text, infinities=True) == {"limit": tagged}
    with pytest.raises(InputError, match="NaN"):
        parse_json("[NaN]", infinities=True)
