"""Evaluation, compared with a direct computation of perplexity and KL divergence."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress import evaluate as run_evaluate
from moepress.compress import compress
from moepress.errors import FileError, InputError, NumericalError
from moepress.evaluation.document import load_evaluation
from moepress.format.checkpoint import folder_bytes, save_json
from tests.conftest import small_recipe, with_context

Folder = Callable[..., Path]
evaluate_module = importlib.import_module("moepress.evaluate")


def test_an_original_is_itself(model_folder: Folder, text_file: Path) -> None:
    folder = model_folder()
    result = run_evaluate(folder, [str(text_file)], against=folder, length=32, limit=5)
    assert result.kl == 0 and result.ratio == 1 and result.texts[0].changed_top == 0


def test_numbers_are_those_of_the_definition(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder()
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2))
    result = run_evaluate(out, [str(text_file)], against=folder, length=32, limit=5)
    (text,) = result.texts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False).input_ids)
    ids = ids[: 5 * 32].view(5, 32)
    losses, kls, moved = [], [], []
    with torch.inference_mode():
        p = AutoModelForCausalLM.from_pretrained(out)(ids).logits.double().log_softmax(-1)
        q = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.double().log_softmax(-1)
    for row in range(5):
        for place in range(31):
            losses.append(-p[row, place, ids[row, place + 1]].item())
            here = q[row, place].exp() * (q[row, place] - p[row, place])
            kls.append(here.sum().item())
            moved.append(bool(p[row, place].argmax() != q[row, place].argmax()))
    assert text.tokens == len(losses)
    assert text.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert text.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert text.changed_top == pytest.approx(sum(moved) / len(moved), abs=0.01)
    assert result.ratio == pytest.approx(text.perplexity / text.original_perplexity)


def test_texts_are_kept_apart(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The cat sat on the mat and looked at the moon. " * 60)
    both = run_evaluate(model_folder(), [str(text_file), str(other)], length=32, limit=4)
    alone = run_evaluate(model_folder(), [str(other)], length=32, limit=4)
    assert both.texts[1].perplexity == pytest.approx(alone.texts[0].perplexity, rel=1e-5)
    assert both.texts[0].perplexity != both.texts[1].perplexity
    assert both.kl is None and both.ratio is None


def test_what_is_not_asked_for_is_not_measured(model_folder: Folder, text_file: Path) -> None:
    result = run_evaluate(model_folder(), [str(text_file)], length=32, limit=2)
    assert result.performance is result.repetition is result.tasks is None


def test_both_models_write_and_ours_is_timed(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    out = compress(model_folder(), tmp_path / "out", small_recipe(text_file, bits=2))
    options = {"length": 32, "limit": 4, "against": model_folder()}
    result = run_evaluate(out, [str(text_file)], **options, generations=3, speed=True)
    plain = run_evaluate(out, [str(text_file)], **options)
    assert result.texts == plain.texts  # the same whether the original is loaded or streamed
    assert result.repetition is not None and result.original_repetition is not None
    assert result.repetition.generations == result.original_repetition.generations == 3
    assert result.performance is not None and result.performance.decode_tokens_per_second > 0
    assert sum(part.stored for part in result.parts.values()) < folder_bytes(out)
    assert result.provenance["activation_bits"] == "8"


def test_an_original_that_does_not_fit_is_still_compared(
    model_folder: Folder,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(evaluate_module, "free_memory", lambda device: 1000)
    folder = model_folder()
    result = run_evaluate(
        folder, [str(text_file)], against=folder, length=32, limit=2, generations=2, speed=True
    )
    assert result.kl == 0 and result.repetition is None and result.performance is None
    assert "1,000 are free: skipping generation, timing and tasks" in caplog.text


def test_another_original_is_told(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As an instructed model, and its base."""
    folder, other = model_folder(), tmp_path / "base"
    made = compress(folder, tmp_path / "made", small_recipe(text_file, bits=2))
    shutil.copytree(folder, other)
    file = other / "model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    options = {"length": 32, "limit": 1}
    run_evaluate(made, [str(text_file)], against=folder, **options)
    assert "another model" not in caplog.text
    run_evaluate(made, [str(text_file)], against=other, **options)
    assert f"made from {folder.name}, whose files are not those of {other}" in caplog.text


def test_no_text_is_refused(model_folder: Folder) -> None:
    with pytest.raises(InputError, match="No text"):
        run_evaluate(model_folder(), [])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"against": "nowhere"}, "No model folder nowhere"),
        ({"against": "empty"}, "config"),
        ({"against": "other"}, "predicts 384 different tokens, and .* 512"),
        ({"against": "truncated"}, "model.safetensors"),
        ({"generations": -2}, "generations is -2"),
        ({"tasks": ["piqa"], "task_limit": 0}, "task_limit is 0"),
        ({"tasks": ["", ","]}, "No task is named"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(
    options: dict[str, Any],
    says: str,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(evaluate_module, "_loaded", loads)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("other", "truncated"):
        shutil.copytree(model_folder(), tmp_path / name)
    config = json.loads(Path("other/config.json").read_text()) | {"vocab_size": 512}
    Path("other/config.json").write_text(json.dumps(config))
    os.truncate("truncated/model.safetensors", 4096)
    with pytest.raises(InputError, match=says):
        run_evaluate(model_folder(), [str(text_file)], length=32, limit=2, **options)


def test_the_current_folder_has_a_name(
    model_folder: Folder, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder())
    result = run_evaluate(".", [str(text_file)], against=".", length=32, limit=1)
    assert result.model == result.original == model_folder().name


def test_a_text_of_more_tokens_than_quantiles_of_torch_take() -> None:
    kl = torch.arange((1 << 24) + 1, dtype=torch.float32)
    values = {"loss": torch.ones(3), "original_loss": torch.ones(3), "kl": kl, "changed": kl[:3]}
    found = evaluate_module.summary("text", values)
    assert found.kl_p99 == pytest.approx(0.99 * (1 << 24), rel=1e-6)


def test_nan_is_an_error_and_no_figure(model_folder: Folder, tmp_path: Path) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    good, bad = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    bad[0, 1, 3] = math.nan
    with pytest.raises(NumericalError, match="The model gives NaN"):
        evaluate_module.compare(ids, bad, None)
    with pytest.raises(NumericalError, match="The original gives NaN"):
        evaluate_module.compare(ids, good, bad)
    good[..., 1] = 1e4
    with pytest.raises(NumericalError, match="mean loss of a text is 1e"):
        evaluate_module.summary("text", evaluate_module.compare(ids, good, None))
    with pytest.raises(NumericalError, match="not written"):
        save_json(tmp_path / "x.json", {"kl": math.nan})
    assert not list(tmp_path.iterdir())


def test_tokens_that_a_model_never_predicts_add_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    p, q = torch.randn(2, 1, 4, 8, generator=generator)
    without = evaluate_module.compare(ids, p[..., :7], q[..., :7])
    p[..., 7] = q[..., 7] = -math.inf
    masked = evaluate_module.compare(ids, p, q)
    assert (without["kl"] > 0).all()
    for name, values in without.items():
        torch.testing.assert_close(masked[name], values)


def test_a_damaged_evaluation_is_refused(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    folder, path = model_folder(), tmp_path / "x.json"
    result = run_evaluate(folder, [str(text_file)], against=folder, length=32, limit=2)
    result.save(path)
    assert load_evaluation(path) == json.loads(path.read_text())
    fields = json.loads(path.read_text())
    for change, message in (
        ({"kind": "plan"}, "not an evaluation"),
        ({"texts": 3}, "texts = 3"),
        ({"texts": [{**fields["texts"][0], "kl": None}]}, "or neither"),
        ({"ratio": None}, "or neither"),
        ({"provenance": {"a": 1}}, "provenance.a = 1"),
        ({"folder_bytes": -1}, "folder_bytes = -1"),
        ({"more": 1}, "unknown field 'more'"),
        ({"repetition": {"generations": 0}}, "repetition"),
    ):
        save_json(path, fields | change)
        with pytest.raises(InputError, match=message):
            load_evaluation(path)
    path.write_text('{"kind": "evaluation", "kl": NaN}')
    with pytest.raises(FileError, match="NaN is no JSON"):
        load_evaluation(path)


def test_windows_longer_than_the_context_are_refused(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    folder = with_context(model_folder(), 32, tmp_path / "short")
    told = r"33 tokens, and the model reads 32 .* lower --length"
    run_evaluate(folder, [str(text_file)], length=32, limit=1)
    with pytest.raises(InputError, match=told):
        run_evaluate(folder, [str(text_file)], length=33, limit=1)
    with pytest.raises(InputError, match=told):
        run_evaluate(model_folder(), [str(text_file)], against=folder, length=33, limit=1)
