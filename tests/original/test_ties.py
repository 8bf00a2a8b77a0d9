"""Head and embedding are one tensor where the checkpoint says so, whatever config.json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.compress import compress
from moepress.dequantize import dequantize
from moepress.errors import CheckpointError
from moepress.kernels.modules import set_activation_bits
from moepress.original.source import Source
from moepress.original.ties import untied_config
from moepress.original.walk import Walk
from moepress.progress import Progress
from tests.conftest import VOCAB, make_model, small_recipe

Folder = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def changed(model_folder: Folder, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model (qwen2_moe is tied) with other tensors and another flag."""

    def make(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], tied: bool) -> Path:
        folder = shutil.copytree(model_folder("qwen2_moe"), tmp_path / "changed")
        state = load_file(folder / "model.safetensors")
        save_file(dict(change(state)), folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        return Path(folder)

    return make


def other_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, HEAD: state[EMBEDDING].flip(0).clone()}


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits  # type: ignore[no-any-return]


def walked(source: Source) -> Tensor:
    walk = Walk(source, IDS)
    with Progress("test", total=2) as progress:
        walk.finish(progress)
    return torch.cat([found for _, found in walk.logits()])


def test_a_head_that_differs_is_kept(
    changed: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = changed(other_head, tied=True)
    source = Source(folder)
    assert "both are kept" in caplog.text
    assert source.embedding_and_head == {EMBEDDING: ("embedding",), HEAD: ("head",)}
    torch.testing.assert_close(walked(source), logits(folder), rtol=1e-4, atol=1e-4)
    recipe = small_recipe(text_file, bits=2.0, head_bits=16, embedding_bits=16)
    out = compress(folder, tmp_path / "out", recipe)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model, original = map(AutoModelForCausalLM.from_pretrained, (out, folder))
    state = original.state_dict()
    assert not torch.equal(state[HEAD], state[EMBEDDING])
    for name in (HEAD, EMBEDDING):
        assert torch.equal(model.state_dict()[name], state[name])


def test_an_equal_head_is_one_tensor(changed: Callable[..., Path]) -> None:
    folder = changed(lambda state: {**state, HEAD: state[EMBEDDING].clone()}, tied=True)
    source = Source(folder)
    assert source.embedding_and_head == {EMBEDDING: ("embedding", "head")}
    assert source.config_json()["tie_word_embeddings"] is True
    torch.testing.assert_close(walked(source), logits(folder), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_may_hold_the_head_alone(changed: Callable[..., Path]) -> None:
    def only_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[HEAD] = state.pop(EMBEDDING)
        return state

    folder = changed(only_head, tied=True)
    source = Source(folder)
    assert source.embedding_and_head == {EMBEDDING: ("embedding", "head")}
    torch.testing.assert_close(walked(source), logits(folder), rtol=1e-4, atol=1e-4)


def test_a_tied_head_may_have_a_bias(
    tokenizer_folder: Path, text_file: Path, tmp_path: Path, reference_backend: None
) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))
    small = {"intermediate_size": 64, "num_local_experts": 4}
    original: Any = make_model("phimoe", tie_word_embeddings=True, lm_head_bias=True, **small)
    with torch.no_grad():
        original.lm_head.bias.normal_()
    original.save_pretrained(folder)
    recipe = small_recipe(text_file, bits=2.0, head_bits=8, embedding_bits=8)
    out = compress(folder, tmp_path / "out", recipe)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.dtype is torch.uint8
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.bias, original.lm_head.bias)
    set_activation_bits(model, 16)
    plain = dequantize(out, tmp_path / "plain")
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, logits(plain), rtol=1e-3, atol=1e-3)


def test_no_head_and_no_tie_is_refused(changed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match='set "tie_word_embeddings": true'):
        Source(changed(dict, tied=False))


def test_an_untied_config_says_so_at_every_level() -> None:
    config = {"text_config": {"hidden_size": 1}, "vision_config": {"depth": 2}, "a": 1}
    assert untied_config(config) == {
        "text_config": {"hidden_size": 1, "tie_word_embeddings": False},
        "vision_config": {"depth": 2},
        "a": 1,
        "tie_word_embeddings": False,
    }
