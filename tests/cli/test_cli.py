"""The command line: arguments reach the functions; exit codes; stdout and stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moepress import __version__, cli, progress
from moepress.cli.recipe_options import DEFAULTS, recipe_of
from moepress.cli.tables import nested_table, table
from moepress.compress import compress
from moepress.errors import CheckpointError
from moepress.evaluate import Evaluation
from moepress.format.checkpoint import DROP_COSTS
from moepress.recipe import NAMED, Recipe
from moepress.store import forecast
from tests.conftest import small_recipe

Folder = Callable[..., Path]
SMALL = ["--sequences", "6", "--sequence-length", "32", "--group-size", "32"]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["moepress", *map(str, arguments)])
    monkeypatch.setattr(progress, "_verbosity", "normal")  # as a process begins
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_stages_then_inspect_evaluate_generate(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    model, scores, plan, out = (
        model_folder(), tmp_path / "s.safetensors", tmp_path / "p.json", tmp_path / "out",
    )  # fmt: skip

    def ok(*arguments: object) -> str:
        code, text, err = run(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return text

    calib = ["--calib", f"{text_file}=1"]
    assert ok("score", model, scores, *calib, *SMALL).splitlines()[-1] == str(scores)
    assert not scores.with_name("s.safetensors.work").exists()
    assert ok("allocate", scores, plan, "--bits", 2.5).splitlines()[-1] == str(plan)
    assert ok("quantize", model, plan, out).splitlines()[-1] == str(out)
    whole = tmp_path / "whole"
    ok("compress", model, whole, "--bits", 2.5, *calib, *SMALL)
    for shard in out.glob("model-*.safetensors"):
        assert shard.read_bytes() == (whole / shard.name).read_bytes()

    described = json.loads(ok("inspect", whole, "--json"))
    assert described["kind"] == "compressed model" and described["average_bits"] <= 2.5
    assert sum(described["bytes_by_part"].values()) == described["tensor_bytes"]
    for path, kind in ((scores, "scores"), (plan, "plan"), (model, "original model")):
        assert json.loads(ok("inspect", path, "--json"))["kind"] == kind
    assert "average_bits" in ok("inspect", whole)

    arguments = ["evaluate", whole, "--against", model, "--text", text_file, "--limit", 3]
    result = json.loads(ok(*arguments, "--length", 64, "--json"))
    assert result["texts"][0]["tokens"] == 3 * 63 and result["kl"] > 0
    assert "perplexity" in ok(*arguments)
    finer = json.loads(ok(*arguments, "--length", 64, "--json", "--activation-bits", 16))
    assert finer["kl"] != result["kl"] and abs(finer["kl"] - result["kl"]) < 0.1 * result["kl"]
    for bits in (8, 16):
        arguments = ["generate", whole, "def f1(x):", "--tokens", 3, "--activation-bits", bits]
        assert ok(*arguments).startswith("def f1(x):")

    arguments = ["evaluate", whole, "--text", text_file, "--limit", 3, "--length", 64, "--json"]
    pruned = json.loads(ok(*arguments, "--prune", 0.3))["pruning"]
    assert sum(pruned["tokens"]) == 2 * 3 * 64 and pruned["share"] == pytest.approx(0.3, abs=0.1)
    assert json.loads(ok(*arguments))["pruning"] is None
    assert ok("prune", whole, "paper", "--protect", 0).splitlines()[-1] == str(whole)
    assert json.loads(ok(*arguments))["pruning"]["protected"] == [0, 0]
    assert json.loads(ok("inspect", whole, "--json"))["pruning"]["renormalise"] is True
    assert "of the chosen experts dropped" in ok(*arguments[:-1])
    assert json.loads(ok(*arguments, "--prune", 0))["pruning"] is None
    ok("prune", whole, 0)
    assert json.loads(ok("inspect", whole / DROP_COSTS, "--json"))["kind"] == "drop costs"

    code, _, err = run(monkeypatch, capsys, "generate", whole, "x", "--activation-bits", 4)
    assert code == 2 and "activation_bits is 4. Expected one of [8, 16]" in err


def test_calibrate_writes_what_inspect_reads(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "routing.safetensors"
    arguments = ["calibrate", model_folder(), out, "--calib", text_file]
    code, text, _ = run(monkeypatch, capsys, *arguments, "--sequences", 6, "--sequence-length", 32)
    assert code == 0 and text.splitlines()[-1] == str(out)
    code, text, _ = run(monkeypatch, capsys, "inspect", out, "--json")
    described = json.loads(text)
    assert described["calibration_tokens"] == 6 * 32
    costs = described["pruning"]["predicted_cost_by_share_dropped"]
    assert list(costs.values()) == sorted(costs.values()) and costs["0.05"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "no/such", "out", "--bits", "2"], "folder"),
        (["compress", "no/such", "out"], "folder"),
        (["compress", "MODEL", "out", *SMALL, "--calib", "missing.txt"], "missing.txt"),
        (["compress", "MODEL", "out", "--bits", "2", "--size", "1GB"], "More than one budget"),
        (["compress", "MODEL", "out", "--size", "much"], "'much' is not understood"),
        (["compress", "MODEL", "out", "--bits", "2", "--recipe", "secret"], "No recipe 'secret'"),
        (
            ["compress", "MODEL", "out", *SMALL, "--bits", "2", "--calib", "missing.txt"],
            "missing.txt",
        ),
        (["compress", "MODEL", "out", "--bits", "2", "--expert-bits", "2,x"], "not understood"),
        (["compress", "MODEL", "out", "--bits", "2", "--device", "cuda:9"], "not available"),
        (["inspect", "nothing-here"], "Cannot inspect"),
        (["generate", "MODEL", ""], "prompt"),
        (["generate", "MODEL", "x", "--prune", "0.15"], "has no moepress_drop_costs"),
        (["generate", "MODEL", "x", "--prune", "some"], "Pruning 'some' is not understood"),
        (["prune", "MODEL", "0.15"], "not a folder made by moepress"),
        (["doctor", "MODEL"], "not a folder made by moepress"),
        (["doctor", "nothing-here"], "not a folder made by moepress"),
        (["demo", __file__], "is no folder"),
        (["generate", "", "x"], "name of the model is empty"),
        (["evaluate", "MODEL", "--text", ""], "name of a text is empty"),
        (
            ["compress", "MODEL", "out", *SMALL, "--calib", "a=9e307", "--calib", "b=9e307"],
            "to be added",
        ),
        (["chat", "MODEL", "--raw", "--temperature", "nan"], "finite temperature"),
        (["chat", "MODEL", "--raw", "--threads", "100000"], "at most 1024"),
        (["serve", "MODEL", "--max-body", "0"], "change --max-body"),
        (["serve", "MODEL", "--cache", "nan"], "--cache is nan"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    tmp_path: Path,
    arguments: Sequence[str],
    says: str,
) -> None:
    given = [str(model_folder()) if a == "MODEL" else a for a in arguments]
    given = [str(tmp_path / "out") if a == "out" else a for a in given]
    code, out, err = run(monkeypatch, capsys, *given)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("moepress: ")]
    assert len(lines) == 1 and says in lines[0] and out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", ["generate OUT x", "evaluate OUT --text t", "report OUT", "prune OUT 0.1",
                  "inspect OUT", "dequantize OUT other", "doctor OUT", "compress OUT other"]
)  # fmt: skip
@pytest.mark.parametrize("work", [".moepress", ".moepress-dequantize"])
def test_an_unfinished_folder_is_called_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: str,
    work: str,
) -> None:
    (tmp_path / "OUT" / work).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *arguments.split())
    assert code == 2 and out == "" and "moepress: OUT is unfinished" in err
    assert "Run the command that makes it once more" in err


def test_a_budget_above_the_largest_is_told_once_in_a_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    arguments = ["compress", model_folder(), tmp_path / "out", "--bits", 9, "--recipe", "fast"]
    with caplog.at_level(logging.WARNING):
        code, _, err = run(monkeypatch, capsys, *arguments, "--calib", text_file, *SMALL)
    assert code == 0 and "estimate: about" in err
    assert caplog.text.count("bits 9 is above the largest possible") == 1


def test_a_closed_stdout_and_small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [0.0, 0.000012345, 0.0012345, 0.012345, 1234.5, -0.0012345]
    monkeypatch.setattr(sys, "stdout", None)
    shown = table(("a",), [[number] for number in numbers]).splitlines()
    assert [line.strip() for line in shown[1:]] == [
        "0.0000", "1.23e-05", "0.00123", "0.0123", "1,234.5", "-0.00123",
    ]  # fmt: skip


def test_what_is_typed_and_is_no_utf8_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    cli._in_utf8()
    assert sys.stdin.readline() == "a\ufffdb\n"


def test_recipes_and_options_reach_the_recipe(text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('quantizer = "rtn"\nexpert_bits = [2, 3]\n')
    recipe = recipe_of(
        str(file), bpw=3.5, calib=[f"{text_file}=2"], sequences=7, sequence_length=64,
        score_tokens=8, expert_bits="1,4", group_size=64, seed=5,
    )  # fmt: skip
    assert recipe == Recipe(
        bpw=3.5, calib=((str(text_file), 2.0),), sequences=7, sequence_length=64,
        score_tokens=8, expert_bits=(1, 4), group_size=64, seed=5, quantizer="rtn",
    )  # fmt: skip


def test_help_shows_the_values_of_the_named_recipes() -> None:
    for field, shown in DEFAULTS.items():
        common, *others = shown.split("; ")
        told = dict.fromkeys(NAMED, common)
        for names, _, value in (other.partition(": ") for other in others):
            told |= {n: value for n in NAMED for name in names.split(", ") if n.startswith(name)}
        for name, recipe in NAMED.items():
            value = getattr(recipe, field)
            if field == "calib":
                value = [text for text, _ in value]
            plain = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            assert told[name] == plain, (field, name)


def test_a_calibration_is_described_in_lines_that_can_be_read() -> None:
    below = [{"layer": 0, "expert": e, "tokens": 3} for e in range(50)]
    result = {"kind": "calibration", "name": "a\x1b[31m", "below": below, "ratio": [[0.5, 0.25]]}
    text = nested_table(result)
    assert max(map(len, text.splitlines())) < 60 and "\x1b" not in text
    assert "below\nlayer  expert  tokens\n0" in text and "... and 10 more" in text
    assert "0.5000  0.2500" in text


def test_help_needs_no_torch_and_every_command_has_an_example() -> None:
    code = (
        "import sys; sys.argv = ['moepress', '--help']\n"
        "from moepress.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert command.callback.__name__ in done.stdout
        text = command.callback.__doc__ or ""
        assert "Example: moepress" in text
        assert not re.search(r"\[[a-z]", text)  # rich would take it for markup and hide it


@pytest.mark.parametrize("module", ["moepress", "moepress.cli"])
def test_python_can_run_it_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"moepress {__version__}\n"


def test_results_on_stdout_progress_on_stderr(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moepress", "compress", str(model_folder()), str(out)]
    options = ["--bits", "2", "--calib", str(text_file), *SMALL]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert "quantize: 2/2" in done.stderr


def test_without_a_budget_all_are_shown_and_scores_are_kept(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    command = ["compress", model_folder(), tmp_path / "out", "--calib", text_file, *SMALL]
    code, text, err = run(monkeypatch, capsys, *command)
    assert code == 0 and "score: 2/2" in err
    assert "predicted loss" in text and "the best that fits is --bits 4" in text
    code, text, err = run(monkeypatch, capsys, *command, "--json")
    assert code == 0 and "score:" not in err
    budgets = json.loads(text)["budgets"]
    assert [b["bits"] for b in budgets] == pytest.approx(np.arange(1, 4.1, 0.25), abs=0.03)
    code, text, err = run(monkeypatch, capsys, *command, "--bits", 2)
    assert code == 0 and text.splitlines()[-1] == str(tmp_path / "out") and "score:" not in err


def test_tables_are_plain_in_a_pipe_and_drawn_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, rows = ("name", "count", "share"), [("a" * 150, 1234, 0.5), ("b", None, True)]
    lines = table(head, rows).splitlines()
    assert len(lines) == 3 and all(line.isascii() for line in lines)
    assert lines[1].split() == ["a" * 150, "1,234", "0.5000"]
    assert lines[2].split() == ["b", "-", "True"]
    assert len(set(map(len, lines))) == 1  # the last column ends in one place
    assert "\x1b[" not in table(head, rows)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = table(head, rows)
    assert "\x1b[" in drawn and "\N{BOX DRAWINGS LIGHT HORIZONTAL}" in drawn
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert max(map(len, plain.splitlines())) <= 60 and "1,234" in plain


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        variables = {"_MOEPRESS_COMPLETE": "complete_bash", "COMP_WORDS": f"moepress {words}"}
        variables["COMP_CWORD"] = str(len(words.split(" ")))
        code = "import sys; sys.argv = ['moepress']; from moepress.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True
        )
        return done.stdout.split()

    assert completed("re") == ["report"]
    assert "--activation-bits" in completed("chat --")


def test_doctor_speaks_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(monkeypatch, capsys, "doctor")
    assert code == 0 and "torch" in text
    code, text, _ = run(monkeypatch, capsys, "doctor", "--json")
    assert code == 0 and json.loads(text)["checks"]


def test_doctor_fails_where_a_folder_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    made = compress(model_folder(), tmp_path / "made", small_recipe(text_file, bits=2))
    assert run(monkeypatch, capsys, "doctor", made)[0] == 0
    code, text, _ = run(monkeypatch, capsys, "doctor", made, "--memory", "1KB")
    assert code == 1 and "failed   speed" in text
    (least,) = re.findall(r"Give more than ([\d,]+) bytes", text)
    enough = int(least.replace(",", "")) + 1
    code, text, _ = run(monkeypatch, capsys, "doctor", made, "--memory", enough)
    assert code == 1 and "There are 1 bytes for experts" in text
    code, _, told = run(
        monkeypatch,
        capsys,
        "evaluate",
        made,
        "--text",
        text_file,
        "--length",
        32,
        "--memory",
        enough,
    )
    assert code == 2 and "There are 1 bytes for experts" in told
    monkeypatch.setattr(forecast, "free_host_memory", lambda: enough + 9999)
    for memory in ("mapped", "all"):
        _, text, _ = run(monkeypatch, capsys, "doctor", made, "--memory", memory)
        assert "10.0 kB in memory" in text and "all in memory" not in text


def test_an_evaluation_that_cannot_be_written_is_shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    def full(result: object, path: Path) -> None:
        raise CheckpointError("No space left")

    monkeypatch.setattr(Evaluation, "save", full)
    options = ["--text", text_file, "--length", 32, "--limit", 1, "--out", tmp_path / "e.json"]
    options += ["--json", "--no-speed", "--generations", 0]
    code, text, told = run(monkeypatch, capsys, "evaluate", model_folder(), *options)
    assert code == 1 and "No space left" in told
    assert json.loads(text)["texts"][0]["perplexity"] > 0


def test_evaluate_report_plot(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
) -> None:
    made = compress(model_folder(), tmp_path / "made", small_recipe(text_file, bits=2))
    result, page = tmp_path / "e.json", tmp_path / "page.html"
    arguments = ["--text", text_file, "--limit", 2, "--length", 32, "--out", result, "--json"]
    code, text, _ = run(monkeypatch, capsys, "evaluate", made, *arguments)
    assert code == 0 and json.loads(text) == json.loads(result.read_text())
    arguments = ["--out", page, "--evaluation", result]
    code, text, _ = run(monkeypatch, capsys, "report", made, *arguments)
    assert code == 0 and text.splitlines()[-1] == str(page)
    perplexity = json.loads(result.read_text())["texts"][0]["perplexity"]
    assert f"{perplexity:.4g}" in page.read_text()
    code, text, _ = run(monkeypatch, capsys, "plot", made, tmp_path / "p", "--format", "png")
    assert code == 0 and all(Path(line).suffix == ".png" for line in text.splitlines())
    code, _, err = run(monkeypatch, capsys, "report", model_folder())
    assert code == 2 and "not a folder made by moepress" in err


def test_tables_show_what_files_hold_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No control characters; and no markup of rich, which fails on a closing tag alone."""
    from moepress.cli.tables import nested_table

    shown = nested_table({"provenance": {"model": "a\x1b[2Jb", "x\x07": 1}})
    assert shown.splitlines() == ["provenance.model  a\\x1b[2Jb", "provenance.x\\x07          1"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "[/bold] :smile:" in nested_table({"model": "[/bold] :smile:"})


def test_large_numbers_have_no_decimals_that_nobody_reads() -> None:
    shown = nested_table({"a": 30195336687.9615, "b": 2106.8906, "c": 7.27863, "d": 1.6e-5})
    assert [line.split()[1] for line in shown.splitlines()] == [
        "30,195,336,688", "2,106.9", "7.2786", "1.6e-05",
    ]  # fmt: skip
