"""Composite models: the language model is compressed, all else is copied, all prompts run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)

from moepress import kernels
from moepress.compress import compress
from moepress.dequantize import dequantize
from moepress.errors import InputError
from moepress.evaluate import evaluate
from moepress.format.checkpoint import load_tensors
from moepress.format.quantization import packed_specs
from moepress.generate import generate
from moepress.hf.mend import mend
from moepress.inspect import inspect
from moepress.original.composite import decoder, language_model
from moepress.original.folder import weight_files
from moepress.original.sizes import COPIED, bytes_by_part
from moepress.original.skeleton import auto_class, open_folder
from moepress.original.source import Source
from moepress.prune import prune
from tests.conftest import small_recipe
from tests.families.composites import COMPOSITES
from tests.families.images import IMAGES, Prompt, pixels
from tests.families.models import make_model, save_model, tiny_config

TEXT_PROMPT = {"input_ids": torch.arange(2, 26)[None]}
# In the default suite: tensors that are transposed on the hub; experts for images inside layers;
# experts in a tower.
USUAL = ("qwen3_vl_moe", "ernie4_5_vl_moe", "dots3_note")
COMPOSITE, CAUSAL_LM = "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"


def folder_of(family: str, path: Path, tokenizer: Path) -> Path:
    """A tiny composite as the hub has it."""
    save_model(make_model(family), path, tokenizer)
    if family == "qwen3_vl_moe":  # its experts are transposed on the hub, but not when saved again
        for file in weight_files(path):
            tensors = load_tensors(file)
            turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}
            save_file(turned, file, metadata={"format": "pt"})
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in weight_files(folder) for n, t in load_tensors(path).items()}


def check_copied(folder: Path, out: Path) -> None:
    """Check that a compressed folder has a composite's other tensors byte by byte."""
    source, found = Source(folder), stored(out)
    assert source.copied
    assert not source.copied.keys() & packed_specs(out).keys()
    for name in source.copied:
        assert found[name].dtype == source.tensor(name).dtype
        assert torch.equal(found[name], source.tensor(name)), name


def check_same(folder: Path, out: Path, image: Prompt, work: Path) -> None:
    """Check a compressed folder against transformers' class with its dequantized weights."""
    packed = open_folder(out).eval()
    exact = open_folder(dequantize(out, work)).eval()
    mend(exact)
    assert type(packed) is type(exact) is type(open_folder(folder))
    with torch.inference_mode(), kernels.only("reference"):
        for run, inputs in ((language_model, TEXT_PROMPT), (lambda model: model, image)):
            expected, logits = run(exact)(**inputs).logits, run(packed)(**inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std())
        other = packed(**{**image, "pixel_values": image["pixel_values"] + 1}).logits
        assert (other - logits)[:, -1].abs().max() > 1e-3, "the image has no influence"
    new = packed.generate(**image, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape[1] in (3, image["input_ids"].shape[1] + 3)


def families() -> list[Any]:
    others = [f for f in COMPOSITES if f not in USUAL]
    return [*USUAL, *(pytest.param(f, marks=pytest.mark.families) for f in others)]


@pytest.mark.parametrize("family", families())
def test_texts_and_images(
    family: str, text_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = folder_of(family, tmp_path / "original", tokenizer_folder)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    check_copied(folder, out)
    check_same(folder, out, IMAGES[family](), tmp_path / "plain")
    before, after = bytes_by_part(folder)[COPIED], bytes_by_part(out)[COPIED]
    assert before.original == after.original == after.stored


def joined(text: Any, composite: str, **fields: Any) -> Any:
    """A composite whose language model is of another family."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    names = {"image_token_index": 380, "image_token_id": 380, "tie_word_embeddings": False}
    parts = {"text_config": text.to_dict(), "vision_config": {**vision, **fields}}
    config = AutoConfig.for_model(composite, **parts, **names)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model


@pytest.mark.families
@pytest.mark.parametrize(
    ("composite", "text", "vision", "image"),
    [
        (
            "mistral3", "mistral4", {"model_type": "pixtral", "head_dim": 16},
            lambda: pixels(64, 4, image_sizes=torch.tensor([[64, 64]])),
        ),
        (
            "llava", "mixtral", {"model_type": "clip_vision_model", "projection_dim": 32},
            lambda: pixels(64, 16),
        ),
    ],
)  # fmt: skip
def test_a_language_model_of_another_family(
    composite: str,
    text: str,
    vision: dict[str, Any],
    image: Any,
    text_file: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    model = joined(tiny_config(text), composite, **vision)
    folder = save_model(model, tmp_path / "original", tokenizer_folder)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    check_copied(folder, out)
    check_same(folder, out, image(), tmp_path / "plain")


# One folder for the tests below. Its model type has a composite class and a causal LM.


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """In bfloat16, its tower in float32, with tensors that transformers does not use."""
    folder = tmp_path_factory.mktemp("qwen3_5_moe")
    model: Any = make_model("qwen3_5_moe").to(torch.bfloat16)
    save_model(model, folder, tokenizer_folder)
    file = weight_files(folder)[-1]
    tensors = load_tensors(file) | {"mtp.fc.weight": torch.ones(4, 4)}
    wide = {n: t.float() if "visual" in n else t for n, t in tensors.items()}
    assert any("visual" in name for name in wide)
    save_file(wide, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.fc.weight"] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (folder / "consolidated.safetensors.index.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def out(original: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = small_recipe(text_file, "default", bits=2.5)
    return compress(original, tmp_path_factory.mktemp("compressed") / "out", recipe)


def test_the_folder_is_the_composites(original: Path, out: Path) -> None:
    here, there = (json.loads((f / "config.json").read_text()) for f in (original, out))
    assert {k: v for k, v in there.items() if k != "quantization_config"} == here
    check_copied(original, out)
    assert torch.float32 in Source(original).copied.values()
    for name in ("preprocessor_config.json", "additional_chat_templates/tools.jinja"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    assert not (out / "consolidated.safetensors.index.json").exists()


def test_it_opens_by_every_class_that_opens_the_original(out: Path) -> None:
    with torch.inference_mode():
        composite = AutoModelForImageTextToText.from_pretrained(out).eval()
        assert type(composite) is Qwen3_5MoeForConditionalGeneration
        expected = composite(**TEXT_PROMPT).logits
        text, info = AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True, dtype=torch.bfloat16
        )
        assert type(text) is Qwen3_5MoeForCausalLM
        assert not info["missing_keys"]
        assert torch.equal(text.eval()(**TEXT_PROMPT).logits, expected)
        bare = AutoModel.from_pretrained(out).eval()
        states = bare(**TEXT_PROMPT).last_hidden_state
        assert torch.equal(composite.lm_head(states), expected)
        with prune(text, 0.3, count=True) as pruned:
            text(**TEXT_PROMPT)
        assert pruned.statistics().share > 0


def test_saved_again_it_is_the_same(out: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(**TEXT_PROMPT).logits, model(**TEXT_PROMPT).logits)


def test_verbs(original: Path, out: Path, text_file: Path) -> None:
    assert generate(out, "def f1(x):", tokens=4).startswith("def f1(x):")
    found = evaluate(
        out, [str(text_file)], against=str(original), length=32, limit=4, generations=0, speed=False
    )
    assert 0 < found.kl < 3
    described = inspect(original)
    assert described["architecture"] == COMPOSITE
    assert described["unused_tensors"] == 1
    source = Source(original)
    weights = sum(source.shape(name).numel() for name in source.copied)
    assert described["copied_weights"] == weights
    assert inspect(out)["bytes_by_part"][COPIED] == sum(map(source.nbytes, source.copied))


def test_unused_tensors_are_told(
    original: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        compress(original, tmp_path / "out", small_recipe(text_file, bits=2.5))
    (told,) = [r.getMessage() for r in caplog.records if "does not use" in r.getMessage()]
    assert "mtp.fc.weight" in told


def test_a_walk_leaves_towers_on_disk(original: Path) -> None:
    source = Source(original)
    with source.loaded(None):
        state = source.model.state_dict()
        assert all(state[name].is_meta for name in source.copied if ".visual." in name)
        assert not state["model.language_model.embed_tokens.weight"].is_meta


# Which class, and where its language model is


@pytest.mark.parametrize(
    ("family", "architectures", "expected"),
    [
        ("mixtral", None, "MixtralForCausalLM"),
        ("qwen3_5_moe", None, COMPOSITE),
        ("qwen3_5_moe", [COMPOSITE], COMPOSITE),
        ("qwen3_5_moe", [CAUSAL_LM], CAUSAL_LM),
        ("mixtral", ["MixtralModel"], "MixtralForCausalLM"),
        ("mistral4", ["Mistral4ForCausalLM"], "Mistral4ForCausalLM"),
    ],
)  # fmt: skip
def test_class(family: str, architectures: list[str] | None, expected: str) -> None:
    config = tiny_config(family)
    config.architectures = architectures
    model = auto_class(config).from_config(config)
    assert type(model).__name__ == expected
    assert language_model(model) is model
    assert decoder(model).layers[0] is not None


def test_a_model_that_writes_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="no causal LM for model type 'vit'"):
        auto_class(AutoConfig.for_model("vit"))


@pytest.mark.families
def test_three_models_in_one(text_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Qwen3-Omni: what thinks is compressed, what speaks is copied, experts of both."""
    thinker = tiny_config("qwen3_omni_moe_thinker")
    small = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
    }
    talker = {
        **small,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
        "rope_parameters": thinker.text_config.rope_parameters,
    }
    config = AutoConfig.for_model(
        "qwen3_omni_moe",
        thinker_config=thinker.to_dict(),
        talker_config={
            "text_config": talker,
            "code_predictor_config": {**small, "num_code_groups": 4},
            "num_code_groups": 4,
            "thinker_hidden_size": 64,
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
        },
        code2wav_config={
            **small,
            "codebook_size": 16,
            "num_quantizers": 4,
            "decoder_dim": 64,
            "upsample_rates": [2, 2],
            "upsampling_ratios": [2],
        },
    )
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    for name, weight in model.talker.named_parameters():
        if ".mlp.experts." in name:  # transformers leaves them as the memory happens to be
            torch.nn.init.normal_(weight, std=0.02)
    folder = save_model(model, tmp_path / "original", tokenizer_folder)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    check_copied(folder, out)
    packed, exact = open_folder(out).eval(), open_folder(dequantize(out, tmp_path / "plain")).eval()
    assert type(packed) is type(model)
    assert language_model(packed) is packed.thinker
    assert all(name.startswith("thinker.") for name in packed_specs(out))
    image = IMAGES["qwen3_omni_moe_thinker"]()
    with torch.inference_mode(), kernels.only("reference"):
        for inputs in (TEXT_PROMPT, image):
            expected, logits = exact.thinker(**inputs).logits, packed.thinker(**inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std())
    assert generate(out, "def f1(x):", tokens=4).startswith("def f1(x):")
