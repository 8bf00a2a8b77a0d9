"""A folder that `save_pretrained` wrote is as good as the one that it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from moepress.compress import compress
from moepress.evaluate import evaluate
from moepress.format.checkpoint import CHECKSUMS, DROP_COSTS, INDEX, PLAN, SCORES
from moepress.inspect import inspect
from moepress.prune import prune, set_pruning
from moepress.report import report
from tests.conftest import small_recipe

IDS = torch.tensor([[5, 9, 300, 17, 2, 44, 8, 8]])


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("made") / "mixtral"
    return compress(model_folder("mixtral"), out, small_recipe(text_file), bits=2.0)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_the_files_of_moepress_come_along(made: Path, tmp_path: Path, text_file: Path) -> None:
    model = opened(made)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / INDEX).is_file()
    for name in ("whole", "shards"):
        folder = tmp_path / name
        before, after = inspect(made), inspect(folder, verify=True)
        assert after["verified_tensors"] > 20
        for key in ("average_bits", "experts_by_bits", "provenance", "tensor_bytes"):
            assert after[key] == before[key]
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((made / file).read_bytes())
        assert report(folder).is_file()
        run = {"length": 32, "limit": 4}
        one, other = (evaluate(f, [str(text_file)], **run).texts for f in (made, folder))
        assert one == other
        set_pruning(folder, 0.2)
        inspect(folder, verify=True)
        assert (logits(opened(folder)) != logits(model)).any()


def test_pruning_in_force_is_saved(made: Path, tmp_path: Path) -> None:
    model = opened(made)
    plain = logits(model)
    with prune(model, 0.3):
        pruned = logits(model)
        model.save_pretrained(tmp_path)
    assert (plain != pruned).any()
    again = opened(tmp_path)
    assert torch.equal(logits(again), pruned)
    prune(again, 0)
    again.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(opened(tmp_path / "plain")), plain)
    model.save_pretrained(tmp_path)  # over the pruned one, with its pruning removed
    assert torch.equal(logits(opened(tmp_path)), plain)
    assert (
        "pruning" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )


def test_saved_over_other_files_there_is_one_model(made: Path, tmp_path: Path) -> None:
    """A file of all weights beside an index: transformers takes the file, whichever is older."""
    model = opened(made)
    plain = logits(model)
    for size in ("60KB", "1GB", "60KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert (tmp_path / INDEX).exists() != (tmp_path / "model.safetensors").exists()
        assert torch.equal(logits(opened(tmp_path)), plain)
    opened(tmp_path).save_pretrained(tmp_path)  # into the folder that it is mapped from
    assert (tmp_path / PLAN).is_file() and (tmp_path / DROP_COSTS).is_file()
    assert torch.equal(logits(opened(tmp_path)), plain)
    inspect(tmp_path, verify=True)


def test_into_its_own_folder_by_another_name(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems where `Model` and `model` are one folder: no path says so."""
    shutil.copytree(made, tmp_path / "Model")
    (tmp_path / "model").symlink_to(tmp_path / "Model")
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    opened(tmp_path / "Model").save_pretrained(tmp_path / "model")
    assert all((tmp_path / "Model" / name).is_file() for name in (PLAN, SCORES, DROP_COSTS))


def test_a_decoder_alone(made: Path, tmp_path: Path) -> None:
    decoder = AutoModel.from_pretrained(made, dtype="auto")
    decoder.save_pretrained(tmp_path)
    assert (tmp_path / CHECKSUMS).is_file()
    with torch.no_grad():
        same = AutoModel.from_pretrained(tmp_path, dtype="auto")(IDS).last_hidden_state
        assert torch.equal(same, decoder(IDS).last_hidden_state)


def test_other_models_are_saved_as_before(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    opened(model_folder("mixtral")).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("moepress_*"))
