"""Every family, tiny: compressed with both recipes, opened, compared with its oracle, run, pruned.

`pytest -m families` runs all of them, minutes; the default run has one of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.families.models import make_model, save_model
from tests.families.state import EXPECTED, FAMILIES, FAST
from tests.families.steps import STEPS, Case

RECIPES = ("default", "fast")


def cases() -> Iterator[object]:
    for family in FAMILIES:
        for recipe in RECIPES:
            marks = [] if (family, recipe) in FAST else [pytest.mark.families]
            yield pytest.param(family, recipe, marks=marks)


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Callable[[str], Path]:
    """The folder of a family's tiny model; made once each."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = save_model(make_model(family), path, tokenizer_folder)
        return made[family]

    return folder


@pytest.mark.parametrize(("family", "recipe"), cases())
def test_family(
    family: str,
    recipe: str,
    original: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    """All steps; or the error that is expected, at the step where it is expected."""
    case = Case(family, original(family), text_file, recipe, tmp_path)
    for name, step in STEPS.items():
        torch.manual_seed(0)
        failure = EXPECTED.get((family, name))
        if failure is None:
            step(case)
            continue
        with pytest.raises(Exception, match=failure.error):
            step(case)
        if failure.last:
            return
