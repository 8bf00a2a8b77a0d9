"""What messages about unfinished work advise: it works, and nothing of other work is left."""

from __future__ import annotations

import hashlib
import importlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.compress import compress
from moepress.dequantize import dequantize
from moepress.errors import FileError, InputError
from moepress.estimate import estimate
from moepress.format.checkpoint import PLAN, SCORES, load_json, save_json, shard_name
from moepress.propose import propose
from moepress.quantize import quantize
from moepress.score import score
from moepress.work import WORK
from tests.conftest import make_model, small_recipe


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stopped(
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    work: Callable[[], object],
    module_name: str = "moepress.quantize",
    call: int = 2,
) -> None:
    """Do some work, stopped when a function of a module is called the second time."""
    module = importlib.import_module(module_name)
    real, calls = getattr(module, function), 0

    def stops(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, function, stops)
        work()


def delete_what_is_named(error: BaseException) -> None:
    """Follow a message that says "delete FOLDER to ..."."""
    (folder,) = re.findall(r"[Dd]elete (\S+) to ", str(error))
    shutil.rmtree(folder)


@pytest.fixture
def other_model(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Another model of the same shapes, such as a fine-tune."""
    shutil.copytree(model_folder(), tmp_path / "other")
    make_model("mixtral", seed=1).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_shards_of_another_model_are_not_taken_for_those_of_this_one(
    model_folder: Callable[..., Path], other_model: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = small_recipe(text_file, bits=2)
    first, second = (
        (model, allocate(score(model, recipe), recipe)) for model in (model_folder(), other_model)
    )
    right = digests(quantize(*second, tmp_path / "right"))
    out = tmp_path / "out"
    stopped(monkeypatch, "quantize_layer", lambda: quantize(*first, out))
    with pytest.raises(InputError, match="model_fingerprint") as caught:
        quantize(*second, out)
    delete_what_is_named(caught.value)
    assert (out / shard_name(None)).is_file()
    assert digests(quantize(*second, out)) == right


def test_another_budget_goes_on_with_the_scores(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    few, more = (small_recipe(text_file, bits=bits) for bits in (1.5, 2.5))
    right = digests(compress(model_folder(), tmp_path / "right", more))
    out = tmp_path / "out"
    stopped(monkeypatch, "quantize_layer", lambda: compress(model_folder(), out, few))
    with pytest.raises(InputError, match="differs in: full_recipe") as caught:
        compress(model_folder(), out, more)
    delete_what_is_named(caught.value)
    scored = (out / SCORES).stat().st_ino
    made = digests(compress(model_folder(), out, more))
    assert (out / SCORES).stat().st_ino == scored
    assert {**made, SCORES: ""} == {**right, SCORES: ""}  # it names the budget it was made with


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        ("moepress.compress", "score_and_store", 1),
        ("moepress.score", "measure_sensitivity", 1),
        ("moepress.score", "score_layer", 2),
        ("moepress.compress", "best_plan", 1),
    ],
)
def test_before_a_plan_is_applied_another_budget_goes_on(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, module: str, function: str, call: int,
) -> None:  # fmt: skip
    few, more = (small_recipe(text_file, "default", bits=bits) for bits in (1.5, 2.5))
    right = digests(compress(model_folder(), tmp_path / "right", more))
    out = tmp_path / "out"
    stopped(monkeypatch, function, lambda: compress(model_folder(), out, few), module, call)
    scored = {path: path.stat().st_ino for path in (out / WORK / "score").glob("layer-*")}
    assert len(scored) == {"score_layer": 1, "best_plan": 2}.get(function, 0)
    with pytest.raises(InputError, match="an option of scoring"):
        compress(model_folder(), out, more.with_changes(seed=7))
    estimate(model_folder(), out, more)
    stopped(monkeypatch, "quantize_layer", lambda: compress(model_folder(), out, more))
    assert all(path.stat().st_ino == inode for path, inode in scored.items())
    made = digests(compress(model_folder(), out, more))
    if function == "best_plan":  # the scores name the budget they were made with
        made[SCORES] = right[SCORES]
    assert made == right


def test_an_older_moepress_kept_the_budget_with_what_was_scored(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe, out = small_recipe(text_file, bits=2), tmp_path / "out"

    def run() -> Path:
        return compress(model_folder(), out, recipe)

    stopped(monkeypatch, "score_layer", run, "moepress.score")
    begun = load_json(out / WORK / "compress.json")
    save_json(out / WORK / "compress.json", begun | {"full_recipe": recipe.digest()})
    assert (run() / "config.json").is_file()


def test_text_that_nothing_says_the_origin_of_is_not_kept(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run that is killed before it has written whose text it is."""
    recipe = small_recipe(text_file, bits=2)
    right = digests(compress(model_folder(), tmp_path / "right", recipe))
    out = tmp_path / "out"
    run = partial(compress, model_folder(), out, recipe.with_changes(seed=7))
    stopped(monkeypatch, "save_json", run, "moepress.format.journal", call=1)
    assert digests(compress(model_folder(), out, recipe)) == right


def test_a_plan_does_not_get_the_text_of_other_work(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe, out = small_recipe(text_file, bits=2), tmp_path / "out"
    plan = allocate(score(model_folder(), recipe), recipe)
    other = recipe.with_changes(seed=7)
    run = partial(compress, model_folder(), out, other)
    stopped(monkeypatch, "score_layer", run, "moepress.score")
    with pytest.raises(InputError, match="differs in: recipe") as caught:
        quantize(model_folder(), plan, out)
    delete_what_is_named(caught.value)
    assert digests(quantize(model_folder(), plan, out)) == digests(
        quantize(model_folder(), plan, tmp_path / "right")
    )


@pytest.mark.parametrize("verb", ["compress", "quantize"])
def test_after_a_stopped_plan_other_work_gets_its_own_text(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, verb: str,
) -> None:  # fmt: skip
    recipe = small_recipe(text_file, bits=2)
    other = recipe.with_changes(seed=7)
    mine, plan = (allocate(score(model_folder(), one), one) for one in (recipe, other))

    def run(out: Path) -> Path:
        compresses = verb == "compress"
        model = model_folder()
        return compress(model, out, recipe) if compresses else quantize(model, mine, out)

    out = tmp_path / "out"
    stopped(monkeypatch, "quantize_layer", lambda: quantize(model_folder(), plan, out))
    with pytest.raises(InputError, match="differs in: recipe") as caught:
        run(out)
    delete_what_is_named(caught.value)
    assert digests(run(out)) == digests(run(tmp_path / "right"))


def test_a_stopped_plan_is_not_found_to_be_another_one_after_scoring(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe, out = small_recipe(text_file, bits=2), tmp_path / "out"
    right = digests(compress(model_folder(), tmp_path / "right", recipe))
    plan = BitAllocation.load(tmp_path / "right" / PLAN)
    plan = replace(plan, bits=plan.bits[:, ::-1])
    stopped(monkeypatch, "quantize_layer", lambda: quantize(model_folder(), plan, out))
    before = digests(out)
    for run in (estimate, compress):
        with pytest.raises(InputError, match="work of `moepress quantize`") as caught:
            run(model_folder(), out, recipe)
        assert digests(out) == before
    delete_what_is_named(caught.value)
    assert digests(compress(model_folder(), out, recipe)) == right


def test_finished_work_needs_no_text_of_the_model_again(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It takes long, and with another number of threads it may be another one."""
    recipe = small_recipe(text_file, bits=2, calib=(("self", 1.0),))
    out, rounded = tmp_path / "out", tmp_path / "rounded"
    before = digests(compress(model_folder(), out, recipe))
    plan = BitAllocation.load(out / PLAN)
    alone = digests(quantize(model_folder(), plan, rounded))
    monkeypatch.setattr("moepress.work._whole_model", lambda _: 1 / 0)
    assert digests(compress(model_folder(), out, recipe)) == before
    assert digests(quantize(model_folder(), plan, rounded)) == alone
    assert propose(model_folder(), out, recipe).plans
    with pytest.raises(InputError, match="finished model of other work"):
        compress(model_folder(), out, recipe.with_changes(bits=3))
    with pytest.raises(InputError, match="differ in: recipe"):
        propose(model_folder(), out, recipe.with_changes(seed=7))


def test_a_folder_with_anything_else_is_no_unfinished_output(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / shard_name(0)).touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="was not made by moepress"):
        compress(model_folder(), tmp_path, small_recipe(text_file, bits=2))
    assert (tmp_path / shard_name(0)).is_file()


def test_a_folder_that_macos_has_shown_is_empty(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    for out in (tmp_path / "packed", tmp_path / "plain"):
        out.mkdir()
        (out / ".DS_Store").write_bytes(bytes(8))
    packed = compress(model_folder(), tmp_path / "packed", small_recipe(text_file, bits=2))
    dequantize(packed, tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (f"{WORK}/quantize/drops-0001.safetensors", "finish_folder"),
        (f"{WORK}/quantize/states-0001.safetensors", "quantize_layer"),
        (f"{WORK}/text.safetensors", "quantize_layer"),
        (f"{WORK}/compress.json", "quantize_layer"),
        (shard_name(0), "quantize_layer"),
        (shard_name(None), "quantize_layer"),
    ],
)
def test_what_a_message_of_a_cut_file_advises_works(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path, name: str, function: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = small_recipe(text_file, bits=2)
    right = digests(compress(model_folder(), tmp_path / "right", recipe))
    out = tmp_path / "out"
    if function == "finish_folder":  # called once: stop as soon as all layers are finished
        module = importlib.import_module("moepress.quantize")
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(module, "finish_folder", lambda *_: 1 // 0)
            compress(model_folder(), out, recipe)
    else:
        stopped(monkeypatch, function, lambda: compress(model_folder(), out, recipe))
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="damaged") as caught:
        compress(model_folder(), out, recipe)
    if "Delete the folder it is in" in str(caught.value):
        shutil.rmtree((out / name).parent)
    else:
        delete_what_is_named(caught.value)
    assert digests(compress(model_folder(), out, recipe)) == right


AfterAStop = tuple[Path, Callable[[], dict[str, str]], dict[str, str]]


@pytest.fixture
def after_a_stop(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AfterAStop:  # fmt: skip
    """An output whose compression stopped after a layer; what goes on; the right digests."""
    recipe = small_recipe(text_file, bits=2)
    right = digests(compress(model_folder(), tmp_path / "right", recipe))
    out = tmp_path / "out"
    stopped(monkeypatch, "quantize_layer", lambda: compress(model_folder(), out, recipe))
    return out, lambda: digests(compress(model_folder(), out, recipe)), right


@pytest.mark.parametrize("layer", [0, None])
def test_a_flipped_bit_of_a_finished_file_does_not_become_part_of_the_model(
    after_a_stop: AfterAStop, layer: int | None
) -> None:
    out, go_on, right = after_a_stop
    content = bytearray((out / shard_name(layer)).read_bytes())
    content[-1000] ^= 4
    (out / shard_name(layer)).write_bytes(content)
    for _ in range(2):  # it does not become right by being asked again
        with pytest.raises(FileError, match=f"{shard_name(layer)} is not as it was") as caught:
            go_on()
    delete_what_is_named(caught.value)
    assert go_on() == right


def test_finished_files_of_an_older_moepress_have_no_checksums(
    after_a_stop: AfterAStop,
) -> None:
    out, go_on, right = after_a_stop
    for path in (out / WORK / "quantize").glob("sums-*.json"):
        path.unlink()
    assert go_on() == right


def test_a_finished_folder_that_lost_a_file_is_not_called_done(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(text_file, bits=2)
    out = compress(model_folder(), tmp_path / "out", recipe)
    (out / shard_name(1)).unlink()
    with pytest.raises(FileError, match=shard_name(1)):
        compress(model_folder(), out, recipe)
