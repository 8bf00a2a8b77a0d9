"""What `inspect` says of files that it does not describe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.evaluate import Evaluation
from moepress.format.checkpoint import CHECKSUMS, save_json
from moepress.format.checksums import write_checksums
from moepress.inspect import inspect
from moepress.pruning.rule import Pruning
from tests import synthetic


def evaluation(folder: Path) -> Path:
    Evaluation("model", None, 256, 10, (), 1.0, {}, {}).save(folder / "evaluation.json")
    return folder / "evaluation.json"


def checksums(folder: Path) -> Path:
    write_checksums(folder, [], {})
    return folder / CHECKSUMS


def thresholds(folder: Path) -> Path:
    save_json(folder / "prune.json", Pruning({0: (0.0, 0.5)}, renormalise=True).to_json())
    return folder / "prune.json"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (evaluation, "holds an evaluation, which `moepress report` shows"),
        (checksums, "holds checksums, which `moepress inspect FOLDER --verify` compares"),
        (thresholds, "holds thresholds of pruning, which commands take as --prune"),
    ],
)
def test_other_files_of_ours_are_named(
    written: Callable[[Path], Path], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        inspect(written(tmp_path))


@pytest.mark.parametrize("text", ['{"kind": ["plan"]}', '{"kind": "calibration"}', "[1]", "{}"])
def test_other_json_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(InputError, match="is not a plan"):
        inspect(tmp_path / "some.json")


def test_scores_of_experts_without_output_are_json(tmp_path: Path) -> None:
    """There is nothing that an error could be relative to."""
    zero = dataclasses.replace(synthetic.scores(2, 4), output_energy=np.zeros(2))
    zero.save(tmp_path / "scores.safetensors")
    found = inspect(tmp_path / "scores.safetensors")
    assert set(found["relative_error_by_bits"].values()) == {None}
    json.dumps(found, allow_nan=False)


def test_files_in_each_others_place_are_named(tmp_path: Path) -> None:
    measured = synthetic.scores(2, 4)
    measured.save(tmp_path / "scores.safetensors")
    allocate(measured).save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"holds scores\. Expected a plan of `moepress allocate`"):
        BitAllocation.load(tmp_path / "scores.safetensors")
    with pytest.raises(InputError, match=r"holds a plan\. Expected scores of `moepress score`"):
        ExpertScores.load(tmp_path / "plan.json")


def test_our_files_are_known_under_any_name(tmp_path: Path) -> None:
    measured = synthetic.scores(2, 4)
    measured.save(tmp_path / "scores")
    allocate(measured).save(tmp_path / "plan.txt")
    assert inspect(tmp_path / "scores")["kind"] == "scores"
    assert inspect(tmp_path / "plan.txt")["kind"] == "plan"
