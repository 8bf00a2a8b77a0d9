"""Zero-shot tasks: results equal lm-eval's own, for a task definition on disk, offline."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress import evaluate
from moepress.cli.tables import evaluation_table
from moepress.compress import compress
from moepress.errors import InputError
from moepress.evaluation.tasks import find_tasks, task_names
from moepress.format.checkpoint import load_json
from moepress.page.sections import SECTIONS
from moepress.page.subject import Subject
from tests import synthetic
from tests.conftest import small_recipe

Folder = Callable[..., Path]
QUESTIONS = Path(__file__).parents[2] / "docs/questions.md"

DEFINITION = """
task: adds
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of twelve questions that no model answers all correctly."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {
            "question": f"def f{i}(x):\n    return",
            "choices": [f" x + {i}", f" x - {i} or something else", " None"],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    data = folder / "adds.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    (folder / "adds.yaml").write_text(DEFINITION.format(data=data))
    return folder


def lm_eval_command() -> list[str]:
    """The command of docs/questions.md for running lm-eval itself."""
    (line,) = re.findall(r'^python -c ("import moepress.*")', QUESTIONS.read_text(), re.MULTILINE)
    return [sys.executable, "-c", *shlex.split(line)]


def test_metrics_equal_those_of_lm_evals_own_command(
    model_folder: Folder, text_file: Path, task_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    out = compress(model_folder(), tmp_path / "out", small_recipe(text_file, bits=2))
    given = {
        "--model": "hf", "--model_args": f"pretrained={out},dtype=auto", "--tasks": "adds",
        "--include_path": task_folder, "--device": "cpu", "--output_path": tmp_path / "results",
    }  # fmt: skip
    subprocess.run(
        [*lm_eval_command(), *(str(x) for pair in given.items() for x in pair)], check=True
    )
    (results,) = (tmp_path / "results").rglob("results_*.json")
    theirs = load_json(results)["results"]["adds"]
    ours = evaluate(
        out, [str(text_file)], length=32, limit=2, tasks=["adds"], include_path=task_folder
    )
    assert ours.tasks is not None and set(ours.tasks) == {"adds"}
    metrics = ours.tasks["adds"]
    assert {"acc,none", "acc_norm,none", "acc_stderr,none"} <= set(metrics)
    assert metrics == {name: theirs[name] for name in metrics}
    assert 0 < metrics["acc,none"] < 1  # not a trivial value
    assert f"{metrics['acc,none']:.4f}" in evaluation_table(ours.to_dict())

    subject = synthetic.subject(2, 4)
    shown = Subject(subject.name, subject.plan, evaluation=ours.to_dict())
    section = next(make for key, _, make in SECTIONS if key == "evaluation")(shown)
    assert ("adds", "acc", metrics["acc,none"], metrics["acc_stderr,none"]) in section.tables[
        1
    ].rows


def test_the_papers_tasks_are_a_set() -> None:
    asked = task_names(["paper,gsm8k", " piqa "])
    assert len(asked) == 9 and asked[0] == "piqa" and asked[-1] == "gsm8k"
    assert {"arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mathqa", "mmlu"} <= {
        *asked
    }


def test_lm_eval_knows_the_papers_tasks(task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match=r"no task nonsense\."):
        find_tasks(["paper", "gsm8k,humaneval", "nonsense", "adds"], task_folder)


def test_what_cannot_be_run_is_refused_before_the_work(
    task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match="No folder"):
        find_tasks(["adds"], task_folder / "missing")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install '\.\[eval\]' in the clone"):
        find_tasks(["adds"], task_folder)
