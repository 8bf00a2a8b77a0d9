"""A model's own generation settings: followed where a command says so, and nowhere else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GenerationMixin

from moepress.chat import Conversation
from moepress.errors import InputError, MoepressError
from moepress.evaluate import evaluate
from moepress.evaluation.repetition import measure_repetition
from moepress.generate import generate
from moepress.generation import CHAT, following, left_aside
from moepress.original.source import Source
from moepress.recipe import Recipe
from moepress.text.samples import own_samples
from moepress.work import calibration_ids
from tests.conftest import make_model

Folder = Callable[..., Path]

# Each changes the text, its amount or the form of the result, or needs what a call does not have.
SETTINGS: dict[str, Any] = {
    "stop_strings": ["zzzz"],
    "return_dict_in_generate": True,
    "output_scores": True,
    "prompt_lookup_num_tokens": 3,
    "num_beams": 2,
    "num_return_sequences": 2,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.8,
    "min_p": 0.9,
    "max_time": 1e-6,
    "max_length": 3,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(5, 200)),
    "guidance_scale": 1.5,
    "use_cache": False,
    "token_healing": True,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("mixtral")


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_calibration_text_and_loops_do_not_depend_on_them(
    model: Any, tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("moepress.evaluation.repetition"), "NEW_TOKENS", 8)
    prompts = torch.arange(2, 10).view(2, 4)

    def written() -> tuple[torch.Tensor, Any]:
        ids = own_samples(lambda: model, tokenizer, 3, 12, random.Random(0))
        return ids, measure_repetition(model, prompts)

    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    plain_ids, plain_loops = written()
    own = GenerationConfig(eos_token_id=1, pad_token_id=1)
    setattr(own, name, SETTINGS[name])
    model.generation_config = own
    ids, loops = written()
    assert torch.equal(ids, plain_ids) and loops == plain_loops and ids.shape == (3, 12)
    assert model.generation_config is own


def test_less_text_than_asked_for_is_refused(tokenizer: Any) -> None:
    class Terse:
        device = torch.device("cpu")
        generation_config = GenerationConfig()

        def get_output_embeddings(self) -> torch.nn.Linear:
            return torch.nn.Linear(8, 384)

        def generate(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids

    with pytest.raises(MoepressError, match=r"wrote \(3, 1\) tokens.*Expected \(3, 12\)"):
        own_samples(Terse, tokenizer, 3, 12, random.Random(0))


def test_a_chat_follows_sampling_and_stops_and_says_what_it_leaves_aside(
    model: Any, tokenizer: Any
) -> None:
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.5, num_beams=2, max_time=1e-6, stop_strings=["zz"],
        return_dict_in_generate=True,
    )  # fmt: skip
    conversation = Conversation(model, tokenizer, raw=True, tokens=4)
    assert left_aside(model, conversation.settings) == "max_time = 1e-06, num_beams = 2"
    with following(model, conversation.settings):
        kept = model.generation_config
        assert (kept.do_sample, kept.temperature, kept.stop_strings) == (True, 0.5, ["zz"])
        assert kept.num_beams is None and kept.max_time is None
    assert conversation.say("def f", lambda _: None).tokens == 4
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.0)
    assert set(CHAT) - set(Conversation(model, tokenizer, raw=True).settings) == {
        "do_sample", "temperature",
    }  # fmt: skip
    model.generation_config.top_p = "0.9"
    with pytest.raises(InputError, match=r"top_p = '0.9'. Expected: a valid number"):
        Conversation(model, tokenizer, raw=True)


@pytest.mark.parametrize(
    "name, value",
    [("eos_token_id", "x"), ("pad_token_id", 1 << 40), ("bad_words_ids", []), ("top_k", -1),
     ("typical_p", 0), ("stop_strings", [3]), ("repetition_penalty", float("nan"))],
)  # fmt: skip
def test_settings_of_wrong_types_are_refused(model: Any, name: str, value: object) -> None:
    model.generation_config = GenerationConfig()
    setattr(model.generation_config, name, value)
    with (
        pytest.raises(InputError, match=f"generation_config.json has {name}"),
        following(model, CHAT),
    ):
        pass


def test_generate_is_greedy_and_stops_at_the_models_strings(
    model_folder: Folder, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    path = folder / "generation_config.json"
    plain = generate(folder, "def f1(x):", tokens=12)
    fields = {"do_sample": True, "temperature": 5.0, "num_beams": 3, "repetition_penalty": 1.9}
    path.write_text(json.dumps(fields | {"return_dict_in_generate": True}), encoding="utf-8")
    assert generate(folder, "def f1(x):", tokens=12) == plain
    tail = plain.removeprefix("def f1(x):")
    path.write_text(json.dumps({"stop_strings": [tail[1:3]]}), encoding="utf-8")
    stopped = generate(folder, "def f1(x):", tokens=12)
    assert plain.startswith(stopped) and len(stopped) < len(plain)


def test_generate_stays_within_the_context(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    read, most = len(tokenizer("def f1(x):")["input_ids"]), config["max_position_embeddings"]
    lengths = []

    def no_text(model: Any, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        lengths.append(input_ids.shape[1] + max_new_tokens)
        return input_ids

    monkeypatch.setattr(GenerationMixin, "generate", no_text)
    for tokens in (3, most - read):
        generate(folder, "def f1(x):", tokens=tokens)
    assert "too many" not in caplog.text
    for tokens in (most - read + 1, 99_999_999_999):
        generate(folder, "def f1(x):", tokens=tokens)
    assert "99,999,999,999 tokens are too many" in caplog.text
    assert lengths == [read + 3, most, most, most]
    with pytest.raises(InputError, match=f"the model reads {most}"):
        generate(folder, "x = 1\n" * most)


def test_flags_of_training_do_not_matter(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    plain = evaluate(folder, [str(text_file)], length=32, limit=2)
    path = folder / "config.json"
    flags = {
        "output_router_logits": True, "output_hidden_states": True, "return_dict": False,
        "use_cache": False, "torchscript": True,
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | flags), encoding="utf-8")
    flagged = evaluate(folder, [str(text_file)], length=32, limit=2, generations=2)
    assert flagged.texts == plain.texts and flagged.repetition is not None


def test_an_adapter_in_the_folder_of_an_original_is_refused(
    model_folder: Folder, tmp_path: Path
) -> None:
    """transformers would open another model than the one that is compressed and measured."""
    peft = pytest.importorskip("peft")
    folder = Path(shutil.copytree(model_folder(), tmp_path / "copy"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, config).save_pretrained(folder)
    with pytest.raises(InputError, match="has an adapter beside the model"):
        generate(folder, "def f1(x):", tokens=4)
    recipe = Recipe(calib=(("self", 1.0),), sequences=1, sequence_length=8)
    with pytest.raises(InputError, match="has an adapter beside the model"):
        calibration_ids(Source(folder), recipe)
