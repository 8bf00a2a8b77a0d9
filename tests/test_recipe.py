"""A recipe checks itself, survives being written, and says what it does not know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moepress.errors import FileError, InputError
from moepress.recipe import FIELDS_AFTER_SCORING, NAMED, Recipe, parse_size, parse_widths


@pytest.mark.parametrize("name", NAMED)
def test_round_trip_through_json(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name, bits=2.5, calib=(("a.txt", 2.0), ("c4", 1.0)))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.load(file) == recipe
    assert Recipe.load(file).digest() == recipe.digest()


def test_digest_sees_every_field_that_is_not_left_out() -> None:
    base = Recipe()
    for field, value in {"bits": 2.0, "seed": 3, "damping": 0.1, "measure": "rtn"}.items():
        changed = base.with_changes(**{field: value})
        assert changed.digest() != base.digest()
        assert (changed.digest(field)) == base.digest(field)


def test_half_widths_are_offered_to_trellis_codes_alone(tmp_path: Path) -> None:
    assert Recipe().expert_bits == (1, 1.5, 2, 2.5, 3, 3.5, 4)
    for scalar in (Recipe(expert_codec="int"), Recipe().with_changes(expert_codec="int")):
        assert scalar.expert_bits == (1, 2, 3, 4)
    with pytest.raises(InputError, match=r"expert_bits is 1\.5"):
        Recipe(expert_codec="int", expert_bits=(1, 1.5))
    file = tmp_path / "recipe.toml"
    file.write_text("expert_bits = [1.5, 2.0]")
    assert str(Recipe.load(file).expert_bits) == "(1.5, 2)"


def test_allocation_fields_are_fields() -> None:
    assert set(FIELDS_AFTER_SCORING) <= {f.name for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 2, "bpw": 3}, "More than one budget"),
        ({"bits": -1}, "bits must be above 0"),
        ({"expert_bits": (3, 2)}, "rising order"),
        ({"expert_bits": ()}, "rising order"),
        ({"expert_bits": (2, 7)}, "expert_bits is 7"),
        ({"at_least_one": (8,)}, "at_least_one asks for 8-bit"),
        ({"quantizer": "magic"}, "quantizer is 'magic'"),
        ({"quantizer": "sign"}, "makes scalar codes only"),
        ({"expert_codec": "int", "linear_codec": "int", "quantizer": "sign"}, "1-bit codes only"),
        ({"damping": 0.0}, "damping"),
        ({"correction": 1.5}, "correction must lie between 0 and 1"),
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"calib": ()}, "calib needs"),
        ({"calib": (("a", -1.0),)}, "above 0"),
        ({"attention_bits": 5}, "attention_bits is 5"),
        ({"head_bits": 2}, "head_bits is 2"),
        ({"linear_bits": (4, 2)}, "linear_bits must be"),
        ({"linear_bits": (5,)}, "linear_bits is 5"),
        ({"sensitivity": "much"}, "sensitivity is 'much'"),
        ({"over": "best"}, "over is 'best'"),
        ({"colour": "red"}, "Unknown recipe field colour"),
        ({"bits": "many"}, "bits = 'many'. Expected: a valid number"),
        ({"bits": float("nan")}, "bits = nan. Expected: a finite number"),
        ({"sequences": 4.5}, "sequences = 4.5. Expected: a valid integer"),
        ({"sequences": True}, "sequences = True. Expected: a valid integer"),
        ({"sequences": 1 << 40}, "sequences must be at least 1 and at most"),
        ({"sequences": 10**5000}, "a number of thousands of digits"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"expert_bits": (1, "2")}, r"expert_bits.1 = '2'"),
        ({"calib": "a.txt"}, "calib = 'a.txt'. Expected: a valid tuple"),
        ({"calib": (("a", float("inf")),)}, "calib.0.1 = inf"),
        ({"calib": (("a",),)}, "no field 'calib.0.1'"),
        ({"per_projection": 1}, "per_projection = 1. Expected: a valid boolean"),
        ({"quantizer": ["gptq"]}, "quantizer is "),
        ({"gamma": 1e9}, "gamma must be at least -64"),
        ({"size": 1 << 70}, "size must be above 0"),
    ],
)
def test_wrong_fields_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe().with_changes(**changes)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("bits = = 2")
    with pytest.raises(InputError, match="Cannot read the recipe"):
        Recipe.load(file)
    for name, text in (
        ("r.json", "[]"), ("r.json", "{"), ("r.json", '{"bits": NaN}'), ("r.json", "[" * 10_000),
        ("r.toml", "bits = nan"), ("r.toml", "a = " + "[" * 10_000), ("r.toml", "bits = 2\0"),
        ("r.toml", "seed = " + "9" * 5000), ("r.toml", "bits = 1979-05-27"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(FileError) as caught:
            Recipe.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_and_widths() -> None:
    assert parse_size("16GB") == 16_000_000_000
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size("700") == 700 and parse_size("2k") == 2000
    assert parse_widths("3,1,2") == (1, 2, 3)
    assert str(parse_widths("2.5,1,2.0")) == "(1, 2, 2.5)"
    for wrong in ("GB", "16 potatoes", "-3GB", "9" * 400):
        with pytest.raises(InputError):
            parse_size(wrong)


def test_names_of_texts_are_normalised() -> None:
    given = ("my-text/", "a//b/./c.jsonl", "./math", "math", "self", "../x", "/abs/")
    recipe = Recipe(calib=tuple((text, 1.0) for text in given))
    assert [text for text, _ in recipe.calib] == [
        "my-text", "a/b/c.jsonl", "./math", "math", "self", "../x", "/abs",
    ]  # fmt: skip
    assert Recipe(calib=(("t/", 1.0),)).digest() == Recipe(calib=(("t", 1.0),)).digest()
